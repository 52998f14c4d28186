//! Servers with names, asked one by one and all together; and those that serve alone, one after another.

use std::collections::BTreeSet;

use crate::support::{Running, antiphon, eventually, fresh, run};

pub(crate) fn nodes_are_called_and_asked(url: &str) {
    let service = fresh("nodes");
    let nodes = ["one", "two"].map(|node| {
        let command = format!("printf {node}");
        Running::serve(url, &service, &["--exec", &command, "--node", node])
    });
    let command = |arguments: &[&str]| run(&[&["--url", url][..], arguments].concat());
    for node in ["one", "two"] {
        let ended = command(&["call", &service, "--node", node]);
        assert_eq!(ended.succeeded().text(), node);
    }
    command(&["call", &service, "--node", "three", "--expect-responder"])
        .failed(3, "no_responder: ");
    command(&["call", &service, "--node", "no node"]).failed(2, "invalid: ");

    let ended = command(&["call", &service, "--all", "--timeout", "20s"]);
    let lines: BTreeSet<_> = ended.succeeded().text().lines().collect();
    assert_eq!(lines, BTreeSet::from(["one\tone", "two\ttwo"]));
    let object = command(&["call", &service, "--all", "--json"])
        .succeeded()
        .object();
    let answers = object["answers"].as_array().unwrap();
    assert_eq!((answers.len(), &object["unheard"]), (2, &0.into()));
    for answer in answers {
        assert_eq!(answer["node"], answer["body"], "{object}");
    }

    let ended = command(&["ping", &service]);
    assert_eq!(ended.succeeded().text().lines().count(), 2, "{ended:?}");
    let infos = command(&["info", &service, "--json"]).succeeded().object();
    for info in infos["answers"].as_array().unwrap() {
        let services = info["services"].as_array().unwrap();
        assert!(services.contains(&service.as_str().into()), "{infos}");
    }
    let stats = command(&["stats", &service, "--json"]).succeeded().object();
    for stats in stats["answers"].as_array().unwrap() {
        assert_eq!(stats["handled"], 3, "{stats}");
    }
    let nobody = fresh("nobody");
    for what in ["ping", "info", "stats"] {
        command(&[what, &nobody]).failed(3, "no_responder: ");
    }
    for node in nodes {
        node.terminate();
    }
    command(&["call", &service, "--all"]).failed(3, "no_responder: ");
}

pub(crate) fn a_standby_and_a_newcomer_take_over(url: &str) {
    let service = fresh("alone");
    let serve = |arguments: &[&str]| Running::serve(url, &service, arguments);
    let who_answers = || {
        run(&["--url", url, "call", &service])
            .succeeded()
            .text()
            .to_owned()
    };
    let owner = serve(&["--exec", "printf owner", "--exclusive"]);
    let arguments = ["serve", &service, "--exec", "printf heir", "--standby"];
    let mut heir = Running::start(antiphon(&[&["--url", url][..], &arguments].concat()));
    assert_eq!(who_answers(), "owner");
    assert!(!heir.has_ended());
    owner.terminate();
    eventually("the standby answers", || who_answers() == "heir");

    let newcomer = serve(&["--exec", "printf newcomer", "--take-over"]);
    assert_eq!(who_answers(), "newcomer");
    heir.end().failed(3, "already_owned: ");
    newcomer.terminate();
}
