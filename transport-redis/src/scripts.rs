//! The steps that must be atomic, as Lua scripts.

use std::sync::LazyLock;

use redis::{RedisResult, Script};

use crate::command::{Cmd, Pipeline};
use crate::connection::Live;
use crate::value::Value;

/// One step: a script and the digest by which it is called.
pub(crate) struct Step(LazyLock<Script>, &'static str);

macro_rules! steps {
    ($($name:ident = $file:literal;)*) => {
        $(pub(crate) static $name: Step = Step(LazyLock::new(|| Script::new(include_str!($file))), include_str!($file));)*
        static ALL: &[&Step] = &[$(&$name),*];
    };
}

steps! {
    ACK = "lua/ack.lua";
    ATTEND = "lua/attend.lua";
    AUDIENCE = "lua/audience.lua";
    BEAT = "lua/beat.lua";
    BEGIN = "lua/begin.lua";
    CLAIM = "lua/claim.lua";
    DONE = "lua/done.lua";
    DONE_ALL = "lua/done_all.lua";
    GIVE_BACK = "lua/give_back.lua";
    JOIN = "lua/join.lua";
    PUSH = "lua/push.lua";
    PUT = "lua/put.lua";
    QUIT = "lua/quit.lua";
    RECLAIM = "lua/reclaim.lua";
    RING = "lua/ring.lua";
    SEND_ONE = "lua/send_one.lua";
    SETTLE = "lua/settle.lua";
    SIGN = "lua/sign.lua";
    WITHDRAW = "lua/withdraw.lua";
}

impl Step {
    /// The command that runs it on these keys; arguments are appended to it.
    pub(crate) fn on(&self, keys: &[&str]) -> Cmd {
        let mut command = Cmd::new("EVALSHA");
        command.arg(self.0.get_hash()).arg(keys.len()).arg(keys);
        command
    }
}

/// Loads every script into the server.
pub(crate) async fn load(live: &Live) -> RedisResult<()> {
    for value in live.execute_as_is(&loading()).await? {
        if let Value::ServerError(error) = value {
            return Err(error.into());
        }
    }
    Ok(())
}

/// The commands that load every script.
pub(crate) fn loading() -> Pipeline {
    let mut pipeline = Pipeline::new();
    for step in ALL {
        pipeline.cmd("SCRIPT").arg("LOAD").arg(step.1);
    }
    pipeline
}
