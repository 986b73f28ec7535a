//! Directives that a running server is told: taken all or not at all, and kept for the next server of the pod.

use super::{NOTHING, Shard, eventually, signal};
use tonic::Code;
use valkeeper_agent::proto::{AgentState, ConfigureRequest, Setting};

fn setting(name: &str, value: &str, named: bool) -> Setting {
    Setting { name: name.to_owned(), words: vec![value.to_owned()], named }
}

impl super::support::Member {
    async fn has(&self, directive: &str) -> String {
        self.run::<Vec<String>>(&format!("CONFIG GET {directive}")).await.unwrap().swap_remove(1)
    }
}

impl Shard {
    async fn configure(
        &self,
        run_id: &str,
        digest: &str,
        settings: Vec<Setting>,
    ) -> Result<AgentState, tonic::Status> {
        let (run_id, digest) = (run_id.to_owned(), digest.to_owned());
        let request = ConfigureRequest { epoch: 2, run_id, digest, settings };
        Ok(self.agent(0).await.configure(request).await?.into_inner().state.unwrap())
    }
}

#[tokio::test]
async fn a_running_server_takes_settings_and_the_next_one_begins_with_them() {
    let shard = Shard::start(1, &format!("# settings first\nslowlog-max-len 7\nhz 20\n{NOTHING}"));
    shard.serve(1, 5, 0).await;
    let member = &shard.members[0];
    let state = shard.greet(0, 2, "").await;
    assert_eq!(state.settings, "first");
    let all = vec![
        setting("availability-zone", "of three words", true),
        setting("client-output-buffer-limit", "replica 1000000 0 0", true),
        setting("hz", "20", true),
        // Not named any more: what a server has by itself.
        setting("slowlog-max-len", "128", false),
        setting("timeout", "0", false),
    ];
    let other = shard.configure(&"0".repeat(40), "second", all.clone()).await.unwrap_err();
    assert_eq!(other.code(), Code::FailedPrecondition, "{other}");
    assert_eq!(member.has("slowlog-max-len").await, "7");
    // A person's own change is not undone where the configuration says nothing of it.
    let _: () = member.run("CONFIG SET timeout 11").await.unwrap();

    let after = shard.configure(&state.run_id, "second", all).await.unwrap();
    assert_eq!(after.settings, "second");
    let taken = async || {
        assert_eq!(member.has("slowlog-max-len").await, "128");
        assert_eq!(member.has("availability-zone").await, "of three words");
        assert!(member.has("client-output-buffer-limit").await.contains("slave 1000000 0 0"));
    };
    taken().await;
    assert_eq!(member.has("timeout").await, "11");
    // As the operator tells them: every class, and those that are named last.
    let limits = "normal 0 0 0 replica 268435456 67108864 60 pubsub 33554432 8388608 60 pubsub 7 7 7";
    let others = vec![setting("client-output-buffer-limit", limits, true)];
    shard.configure(&state.run_id, "third", others).await.unwrap();
    let limits = member.has("client-output-buffer-limit").await;
    assert!(limits.contains("slave 268435456 67108864 60") && limits.contains("pubsub 7 7 7"), "{limits}");
    let before = vec![setting("client-output-buffer-limit", "replica 1000000 0 0", true)];
    shard.configure(&state.run_id, "second", before).await.unwrap();
    let same = member.field("run_id").await;
    assert_eq!(same, state.run_id, "nothing was restarted");

    signal(member.server_pid().await, "KILL");
    let again = eventually("the next server", || async {
        let again = shard.greet(0, 2, "").await;
        (!again.run_id.is_empty() && again.run_id != same).then_some(again)
    })
    .await;
    assert_eq!(again.settings, "second");
    taken().await;
}

#[tokio::test]
async fn what_the_server_refuses_changes_nothing_and_is_told_in_its_words() {
    let shard = Shard::start(1, &format!("# settings first\n{NOTHING}"));
    shard.serve(1, 5, 0).await;
    let member = &shard.members[0];
    let run_id = shard.greet(0, 2, "").await.run_id;
    let bad = vec![setting("hz", "50", true), setting("locale-collate", "nowhere", true)];
    let refused = shard.configure(&run_id, "second", bad).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("locale-collate"), "{refused}");
    assert_eq!(member.has("hz").await, "10", "all or nothing");
    assert_eq!(shard.greet(0, 2, "").await.settings, "first");
    // No mistake of an operator's changes what is not the user's.
    for (name, value) in [("port", "1"), ("io-threads", "2"), ("min-replicas-to-write", "1")] {
        let refused = shard.configure(&run_id, "second", vec![setting(name, value, true)]).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{name}: {refused}");
    }
    // Taken by the server and not kept: the next server would begin without, and nobody may take the settings of before for granted.
    let copy = member.dir.join("run/valkey.conf.new");
    std::fs::create_dir(&copy).unwrap();
    let half = shard.configure(&run_id, "half", vec![setting("hz", "77", true)]).await.unwrap_err();
    assert_eq!(half.code(), Code::Internal, "{half}");
    let settings = shard.greet(0, 2, "").await.settings;
    assert!(!["first", "half"].contains(&settings.as_str()) && !settings.is_empty(), "{settings}");
    std::fs::remove_dir(copy).unwrap();
    let back = vec![setting("hz", "10", false)];
    assert_eq!(shard.configure(&run_id, "first", back).await.unwrap().settings, "first");
    assert_eq!(member.has("hz").await, "10", "though the configuration never named another");
    let good = vec![setting("hz", "50", true)];
    assert_eq!(shard.configure(&run_id, "third", good).await.unwrap().settings, "third");
    assert_eq!(member.has("hz").await, "50");
}
