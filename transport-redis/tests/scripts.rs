//! The scripts by themselves: a request is always in exactly one place, and a session that was ended completes nothing.

mod support;

use std::collections::HashMap;

use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands, Script, Value};

use support::{Broker, fresh_service};

const BEAT: &str = include_str!("../src/lua/beat.lua");
const CLAIM: &str = include_str!("../src/lua/claim.lua");
const DONE: &str = include_str!("../src/lua/done.lua");
const DONE_ALL: &str = include_str!("../src/lua/done_all.lua");
const GIVE_BACK: &str = include_str!("../src/lua/give_back.lua");
const JOIN: &str = include_str!("../src/lua/join.lua");
const QUIT: &str = include_str!("../src/lua/quit.lua");
const RECLAIM: &str = include_str!("../src/lua/reclaim.lua");
const ACK: &str = include_str!("../src/lua/ack.lua");
const ATTEND: &str = include_str!("../src/lua/attend.lua");

const TTL: u64 = 60_000;

/// Until when a session may be registered, ms.
const NEVER_LATE: &str = "9000000000000";

/// The key that shows that a session's process lives.
fn alive(session: &str) -> String {
    let process = session.split('.').next().unwrap_or_default();
    format!("{{{process}}}:alive")
}

/// A small generator of numbers, so that a failure can be repeated from its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }
}

/// One service, its sessions, and what they believe to hold.
struct Model {
    redis: MultiplexedConnection,
    tag: String,
    sessions: Vec<Held>,
    pushed: usize,
    random: Random,
}

struct Held {
    name: String,
    next: u64,
    tokens: Vec<String>,
    ended: bool,
}

impl Model {
    fn key(&self, suffix: &str) -> String {
        format!("{}:{suffix}", self.tag)
    }

    fn inbox(&self) -> String {
        "{model}:i".to_owned() + &self.tag
    }

    /// What is needed to end a session.
    fn end_keys(&self, name: &str) -> [String; 8] {
        [
            self.key("s"),
            self.key("l"),
            self.key("h"),
            self.key("x"),
            self.key(&format!("p:{name}")),
            self.key("r"),
            self.key("bell"),
            alive(name),
        ]
    }

    async fn script(&mut self, source: &str, keys: &[String], arguments: &[String]) -> Value {
        let script = Script::new(source);
        let mut invocation = script.prepare_invoke();
        for key in keys {
            invocation.key(key);
        }
        for argument in arguments {
            invocation.arg(argument);
        }
        invocation.invoke_async(&mut self.redis).await.unwrap()
    }

    async fn join(&mut self) {
        let name = uuid::Uuid::new_v4().simple().to_string();
        let keys = [self.key("s"), self.key("l"), self.key("x"), alive(&name)];
        let arguments = [&name, "shared", "", "", "60000", "600000", NEVER_LATE].map(str::to_owned);
        assert_eq!(self.script(JOIN, &keys, &arguments).await, Value::Int(0));
        self.sessions.push(Held {
            name,
            next: 0,
            tokens: Vec::new(),
            ended: false,
        });
    }

    async fn ask(&mut self, name: &str, mode: &str, follows: &str) -> Value {
        self.take_over(name, mode, follows, "").await
    }

    async fn take_over(
        &mut self,
        name: &str,
        mode: &str,
        follows: &str,
        fenced_off: &str,
    ) -> Value {
        let keys = [self.key("s"), self.key("l"), self.key("x"), alive(name)];
        let arguments = [
            name, mode, follows, fenced_off, "60000", "600000", NEVER_LATE,
        ]
        .map(str::to_owned);
        self.script(JOIN, &keys, &arguments).await
    }

    async fn push(&mut self) {
        let frame = format!("frame-{}", self.pushed);
        self.pushed += 1;
        let _: () = self.redis.rpush(self.key("q"), frame).await.unwrap();
    }

    async fn claim(&mut self, at: usize) {
        let count = 1 + self.random.below(4);
        let (name, next, ended) = {
            let session = &self.sessions[at];
            (session.name.clone(), session.next, session.ended)
        };
        let keys = [
            self.key("l"),
            self.key("q"),
            self.key("r"),
            self.key(&format!("p:{name}")),
            self.key("bell"),
            self.key("h"),
        ];
        let known = u8::from(!self.sessions[at].tokens.is_empty());
        let mode = self.random.below(3);
        let arguments = [
            name,
            count.to_string(),
            next.to_string(),
            mode.to_string(),
            TTL.to_string(),
            (1 - known).to_string(),
        ];
        match self.script(CLAIM, &keys, &arguments).await {
            Value::Int(-1) => assert!(ended, "a live session was refused"),
            Value::Array(answer) => {
                assert!(!ended, "a session that was ended took work");
                let Value::Int(attempt) = answer[2] else {
                    panic!("{answer:?}")
                };
                let session = &mut self.sessions[at];
                let Value::Array(frames) = &answer[3] else {
                    panic!("{answer:?}")
                };
                for _ in frames {
                    let number = session.next;
                    session.next += 1;
                    session.tokens.push(if attempt > 0 {
                        format!("{number}.{attempt}")
                    } else {
                        number.to_string()
                    });
                }
            }
            other => panic!("{other:?}"),
        }
    }

    /// Completes some of what the session believes to hold, and some that it does not.
    async fn complete(&mut self, at: usize) {
        let (name, ended) = (self.sessions[at].name.clone(), self.sessions[at].ended);
        let mut tokens = Vec::new();
        for _ in 0..=self.random.below(4) {
            let count = self.sessions[at].tokens.len();
            if count > 0 {
                let index = self.random.below(count);
                tokens.push(self.sessions[at].tokens.swap_remove(index));
            }
        }
        tokens.push("999999".to_owned());
        let mut arguments = vec![TTL.to_string(), "0".to_owned(), tokens.len().to_string()];
        for token in &tokens {
            arguments.extend([token.clone(), format!("reply-{name}-{token}")]);
        }
        let keys = [
            self.key(&format!("p:{name}")),
            self.inbox(),
            self.inbox() + ":w",
        ];
        let Value::BulkString(bits) = self.script(DONE, &keys, &arguments).await else {
            panic!("no bits")
        };
        let (last, held) = bits.split_last().unwrap();
        assert_eq!((*last, held.len()), (b'0', tokens.len() - 1));
        let expected = if ended { b'0' } else { b'1' };
        assert!(
            held.iter().all(|&bit| bit == expected),
            "ended: {ended}, {bits:?}"
        );
    }

    /// Completes, for the first time, some of what the session believes to hold.
    async fn complete_all(&mut self, at: usize) {
        let (name, ended) = (self.sessions[at].name.clone(), self.sessions[at].ended);
        let count = self.sessions[at].tokens.len().min(3);
        if count == 0 {
            return;
        }
        let tokens: Vec<String> = self.sessions[at].tokens.drain(..count).collect();
        let mut arguments = vec![TTL.to_string(), count.to_string()];
        arguments.extend(tokens.iter().cloned());
        arguments.push(count.to_string());
        arguments.extend(tokens.iter().map(|token| format!("reply-{name}-{token}")));
        let keys = [
            self.key(&format!("p:{name}")),
            self.inbox(),
            self.inbox() + ":w",
        ];
        let held = self.script(DONE_ALL, &keys, &arguments).await;
        assert_eq!(held, Value::Int(i64::from(!ended)));
    }

    async fn give_back(&mut self, at: usize) {
        let ended = self.sessions[at].ended;
        let Some(token) = self.sessions[at].tokens.pop() else {
            return;
        };
        let attempt = token
            .split_once('.')
            .map_or(1, |(_, attempt)| attempt.parse().unwrap());
        let attempt = attempt + self.random.below(2);
        let held = self.key(&format!("p:{}", self.sessions[at].name));
        let keys = [held, self.key("q"), self.key("r"), self.key("bell")];
        let answer = self
            .script(
                GIVE_BACK,
                &keys,
                &[token, attempt.to_string(), TTL.to_string()],
            )
            .await;
        assert_eq!(answer, Value::Int(i64::from(!ended)));
    }

    /// Ends a session as two monitors at once would, when its lease is over.
    async fn reclaim(&mut self, at: usize) {
        let name = self.sessions[at].name.clone();
        let keys = self.end_keys(&name);
        let arguments = [
            name.clone(),
            "0".to_owned(),
            TTL.to_string(),
            TTL.to_string(),
        ];
        let before = self.script(RECLAIM, &keys, &arguments).await;
        assert_eq!(before, Value::Int(-1), "a session that lives was ended");
        if !self.sessions[at].ended {
            let _: () = self.redis.del(alive(&name)).await.unwrap();
            let Value::Int(count) = self.script(RECLAIM, &keys, &arguments).await else {
                panic!()
            };
            assert_eq!(
                usize::try_from(count).unwrap(),
                self.sessions[at].tokens.len()
            );
            assert_eq!(
                self.script(RECLAIM, &keys, &arguments).await,
                Value::Int(-1)
            );
            self.sessions[at].ended = true;
        }
    }

    /// Every request that was pushed is in exactly one place, and whoever holds one is known for it.
    async fn check(&mut self) {
        let holding: Vec<String> = self.redis.smembers(self.key("h")).await.unwrap();
        let mut places: HashMap<String, usize> = HashMap::new();
        let queue: Vec<String> = self.redis.lrange(self.key("q"), 0, -1).await.unwrap();
        let returned: Vec<String> = self.redis.lrange(self.key("r"), 0, -1).await.unwrap();
        let mut frames = queue;
        for pair in returned.chunks(2) {
            assert!(pair[0].parse::<u32>().unwrap() > 1, "{pair:?}");
            frames.push(pair[1].clone());
        }
        for at in 0..self.sessions.len() {
            let name = &self.sessions[at].name;
            let held: HashMap<String, String> = self
                .redis
                .hgetall(self.key(&format!("p:{name}")))
                .await
                .unwrap();
            assert!(!self.sessions[at].ended || held.is_empty());
            assert!(held.is_empty() || holding.contains(name));
            assert!(
                held.keys()
                    .all(|token| self.sessions[at].tokens.contains(token))
                    || self.sessions[at].ended
            );
            frames.extend(held.into_values());
        }
        for frame in frames {
            *places.entry(frame).or_default() += 1;
        }
        let replies: usize = self.redis.llen(self.inbox()).await.unwrap();
        assert!(places.values().all(|&count| count == 1), "{places:?}");
        assert_eq!(
            places.len() + replies,
            self.pushed,
            "{places:?} and {replies} replies"
        );
    }
}

#[tokio::test]
async fn a_request_is_in_one_place_at_every_moment() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    for seed in 0..12 {
        let tag = format!("{{{}}}", fresh_service());
        let redis = broker.plain().await;
        let mut model = Model {
            redis,
            tag,
            sessions: Vec::new(),
            pushed: 0,
            random: Random(seed),
        };
        println!("seed {seed}");
        for _ in 0..3 {
            model.join().await;
        }
        for _ in 0..200 {
            let at = model.random.below(model.sessions.len());
            match model.random.below(14) {
                0..=3 => model.push().await,
                4..=6 => model.claim(at).await,
                7..=8 => model.complete(at).await,
                9..=10 => model.complete_all(at).await,
                11 => model.give_back(at).await,
                12 => model.reclaim(at).await,
                _ if model.sessions.len() < 8 => model.join().await,
                _ => {}
            }
            model.check().await;
        }
    }
}

#[tokio::test]
async fn a_session_that_quit_takes_nothing_and_keeps_what_it_holds() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let tag = format!("{{{}}}", fresh_service());
    let redis = broker.plain().await;
    let mut model = Model {
        redis,
        tag,
        sessions: Vec::new(),
        pushed: 0,
        random: Random(1),
    };
    model.join().await;
    model.push().await;
    while model.sessions[0].tokens.is_empty() {
        model.claim(0).await;
    }
    model.push().await;
    let held = model.key(&format!("p:{}", model.sessions[0].name));
    let keys = [
        model.key("l"),
        held,
        model.key("q"),
        model.key("r"),
        model.key("bell"),
    ];
    let name = model.sessions[0].name.clone();
    let answer = model.script(QUIT, &keys, &[name, TTL.to_string()]).await;
    assert_eq!(answer, Value::Array(vec![Value::BulkString(b"0".to_vec())]));
    let rung: usize = model.redis.zcard(model.key("bell")).await.unwrap();
    assert_eq!(rung, 1, "what is left was not rung for");
    model.sessions[0].ended = true;
    model.claim(0).await;
    model.sessions[0].ended = false;
    model.complete(0).await;
    model.check().await;
}

#[tokio::test]
async fn a_late_acknowledgement_of_an_old_epoch_cuts_nothing() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let tag = format!("{{{}}}", fresh_service());
    let redis = broker.plain().await;
    let mut model = Model {
        redis,
        tag,
        sessions: Vec::new(),
        pushed: 0,
        random: Random(1),
    };
    let (epoch, inbox) = (model.key("i:e"), model.key("i"));
    let _: () = model.redis.set(&epoch, "new").await.unwrap();
    let _: () = model.redis.rpush(&inbox, &["1", "2", "3"]).await.unwrap();
    let keys = [epoch, inbox.clone()];
    let mut late = ["old", "2", "60000", "60000"].map(str::to_owned);
    assert_eq!(model.script(ACK, &keys, &late).await, Value::Int(0));
    assert_eq!(model.redis.llen::<_, usize>(&inbox).await.unwrap(), 3);
    late[0] = "new".to_owned();
    assert_eq!(model.script(ACK, &keys, &late).await, Value::Int(1));
    assert_eq!(
        model
            .redis
            .lrange::<_, Vec<String>>(&inbox, 0, -1)
            .await
            .unwrap(),
        ["3"]
    );
}

#[tokio::test]
async fn an_owner_and_others_exclude_each_other() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let tag = format!("{{{}}}", fresh_service());
    let redis = broker.plain().await;
    let mut model = Model {
        redis,
        tag,
        sessions: Vec::new(),
        pushed: 0,
        random: Random(1),
    };
    let service = fresh_service();
    let session = |name: &str| format!("{service}-{name}.1");
    assert_eq!(
        model.ask(&session("a"), "exclusive", "").await,
        Value::Int(1)
    );
    assert_eq!(
        model.ask(&session("b"), "exclusive", "").await,
        Value::Int(-1)
    );
    assert_eq!(model.ask(&session("b"), "shared", "").await, Value::Int(-1));
    // One that takes over is told whom to fence off, though that one's process lives.
    let owner = Value::Array(vec![Value::BulkString(session("a").into_bytes())]);
    let taken_over = model
        .take_over(&session("b"), "exclusive", "", &session("a"))
        .await;
    assert_eq!(taken_over, owner);
    // Its own successor is let in; the number grows.
    let successor = format!("{service}-a.2");
    let answer = model.ask(&successor, "exclusive", &session("a")).await;
    assert_eq!(answer, Value::Int(2));
    // Who came in between is not the one to be fenced off.
    let late = model
        .take_over(&session("b"), "exclusive", "", &session("a"))
        .await;
    assert_eq!(late, Value::Int(-1));
    // One whose process is gone is not passed by: what it held must be returned first.
    let _: () = model.redis.del(alive(&successor)).await.unwrap();
    let over = Value::Array(vec![Value::BulkString(successor.clone().into_bytes())]);
    assert_eq!(model.ask(&session("b"), "shared", "").await, over);
    let keys = model.end_keys(&successor);
    let end = [&successor, "0", "60000", "60000"].map(str::to_owned);
    assert_eq!(model.script(RECLAIM, &keys, &end).await, Value::Int(0));
    assert_eq!(model.ask(&session("b"), "shared", "").await, Value::Int(0));
    assert_eq!(model.ask(&session("c"), "shared", "").await, Value::Int(0));
    for fenced_off in ["", &session("b")] {
        let answer = model
            .take_over(&session("d"), "exclusive", "", fenced_off)
            .await;
        assert_eq!(answer, Value::Int(-1));
    }
}

#[tokio::test]
async fn a_registration_that_comes_late_is_refused() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let tag = format!("{{{}}}", fresh_service());
    let redis = broker.plain().await;
    let mut model = Model {
        redis,
        tag,
        sessions: Vec::new(),
        pushed: 0,
        random: Random(1),
    };
    let name = format!("{}.1", fresh_service());
    let (seconds, micros): (u64, u64) = redis::cmd("TIME")
        .query_async(&mut model.redis)
        .await
        .unwrap();
    let now = seconds * 1000 + micros / 1000;
    let keys = [model.key("s"), model.key("l"), model.key("x"), alive(&name)];
    for (until, expected) in [(now - 1, -2), (now + 60_000, 1)] {
        let until = until.to_string();
        let arguments = [&name, "exclusive", "", "", "60000", "600000", &until].map(str::to_owned);
        let answer = model.script(JOIN, &keys, &arguments).await;
        assert_eq!(answer, Value::Int(expected));
        let there: usize = model.redis.exists(&keys[..]).await.unwrap();
        assert_eq!(there, if expected < 0 { 0 } else { keys.len() });
    }
}

#[tokio::test]
async fn a_process_whose_session_is_fenced_off_is_told() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let tag = format!("{{{}}}", fresh_service());
    let redis = broker.plain().await;
    let mut model = Model {
        redis,
        tag,
        sessions: Vec::new(),
        pushed: 0,
        random: Random(1),
    };
    let process = fresh_service();
    for (index, (how, told)) in [("1", false), ("2", true)].into_iter().enumerate() {
        let name = format!("{process}.{index}");
        assert_eq!(model.ask(&name, "shared", "").await, Value::Int(0));
        let _: () = model.redis.set_ex(alive(&name), "1", 60).await.unwrap();
        let keys = model.end_keys(&name);
        let end = [&name, how, "60000", "60000"].map(str::to_owned);
        assert_eq!(model.script(RECLAIM, &keys, &end).await, Value::Int(0));
        let sign: String = model.redis.get(alive(&name)).await.unwrap();
        assert_eq!(sign == "0", told);
        assert!(model.redis.pttl::<_, i64>(alive(&name)).await.unwrap() > 0);
    }
    // One that is gone does not come back by it.
    let name = format!("{process}.7");
    assert_eq!(model.ask(&name, "shared", "").await, Value::Int(0));
    let _: () = model.redis.del(alive(&name)).await.unwrap();
    let keys = model.end_keys(&name);
    let end = [&name, "2", "60000", "60000"].map(str::to_owned);
    assert_eq!(model.script(RECLAIM, &keys, &end).await, Value::Int(0));
    assert!(!model.redis.exists::<_, bool>(alive(&name)).await.unwrap());
}

#[tokio::test]
async fn a_process_that_was_gone_is_told_when_it_signs_again() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let tag = format!("{{{}}}", fresh_service());
    let redis = broker.plain().await;
    let mut model = Model {
        redis,
        tag,
        sessions: Vec::new(),
        pushed: 0,
        random: Random(1),
    };
    let name = format!("{}.1", fresh_service());
    let sign = alive(&name);
    assert_eq!(model.ask(&name, "shared", "").await, Value::Int(0));
    assert_eq!(model.redis.get::<_, String>(&sign).await.unwrap(), "0");
    // One that stands is prolonged, and says what it said.
    let _: () = model.redis.set_ex(&sign, "1", 1).await.unwrap();
    assert_eq!(model.ask(&name, "shared", "").await, Value::Int(0));
    assert_eq!(model.redis.get::<_, String>(&sign).await.unwrap(), "1");
    assert!(model.redis.pttl::<_, i64>(&sign).await.unwrap() > 1000);
    let audience = model.key("a");
    let attend = ["{x}:i", "60000", "600000"].map(str::to_owned);
    let _: () = model.redis.del(&sign).await.unwrap();
    let answer = model
        .script(ATTEND, &[audience, sign.clone()], &attend)
        .await;
    assert_eq!(answer, Value::Int(1));
    assert_eq!(model.redis.get::<_, String>(&sign).await.unwrap(), "0");
}

#[tokio::test]
async fn an_owner_that_asks_again_keeps_its_number() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let mut redis = broker.plain().await;
    let service = fresh_service();
    let connection = redis.clone();
    let join = |name: &'static str, follows: &'static str| {
        let script = Script::new(JOIN);
        let mut redis = connection.clone();
        let service = service.clone();
        async move {
            let mut invocation = script.prepare_invoke();
            for suffix in ["s", "l", "x"] {
                invocation.key(format!("{{{service}}}:{suffix}"));
            }
            invocation.key(alive(name));
            invocation.arg(name).arg("exclusive").arg(follows).arg("");
            invocation.arg(TTL).arg(600_000).arg(NEVER_LATE);
            invocation.invoke_async::<i64>(&mut redis).await.unwrap()
        }
    };
    for _ in 0..3 {
        assert_eq!(join("one", "").await, 1);
    }
    assert_eq!(join("two", "").await, -1);
    assert_eq!(join("two", "one").await, 2);
    assert_eq!(join("two", "one").await, 2);
    assert_eq!(join("one", "").await, -1);
    let _: () = redis
        .del(
            ["s", "l", "x"]
                .map(|suffix| format!("{{{service}}}:{suffix}"))
                .into_iter()
                .chain([alive("one"), alive("two")])
                .collect::<Vec<_>>(),
        )
        .await
        .unwrap();
}

#[tokio::test]
async fn who_holds_work_is_known_for_it_again_after_the_next_renewal() {
    let Some(broker) = Broker::any().await else {
        return;
    };
    let tag = format!("{{{}}}", fresh_service());
    let redis = broker.plain().await;
    let mut model = Model {
        redis,
        tag,
        sessions: Vec::new(),
        pushed: 0,
        random: Random(1),
    };
    model.join().await;
    let name = model.sessions[0].name.clone();
    let holding = model.key("h");
    let held = model.key(&format!("p:{name}"));
    let keys = [
        model.key("s"),
        model.key("l"),
        holding.clone(),
        held.clone(),
        model.key("x"),
    ];
    let arguments = [name, TTL.to_string()];
    let beat = async |model: &mut Model| {
        assert_eq!(model.script(BEAT, &keys, &arguments).await, Value::Int(1));
        model.redis.scard::<_, usize>(&holding).await.unwrap()
    };
    assert_eq!(beat(&mut model).await, 0);
    model.push().await;
    model.claim(0).await;
    // A failover lost it, or part of it.
    let _: () = model.redis.del(&holding).await.unwrap();
    assert!(model.redis.exists::<_, bool>(&held).await.unwrap());
    assert_eq!(beat(&mut model).await, 1);
    assert!(model.redis.pttl::<_, i64>(&holding).await.unwrap() > 0);
    model.check().await;
}
