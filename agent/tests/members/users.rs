//! Users' files that change while servers run, each member's at another moment, as kubelet brings a changed Secret.

use super::{NOTHING, Shard, eventually};
use std::fs;

const OTHERS: &str =
    "user default on nopass ~* &* +@all\nuser valkeeper on nopass +ping +info +role +cluster|nodes\n";

impl super::support::Member {
    /// The Secret's next version reaches this member: another password of replication.
    fn mount(&self, password: &str) {
        let users = format!("{OTHERS}user replica on >{password} +ping +psync +replconf\n");
        let auth = format!("primaryuser replica\nprimaryauth {password}\n");
        for (name, text) in [("users.acl", users), ("auth.conf", auth)] {
            // Whole, as kubelet brings it.
            let unfinished = self.dir.join(format!("{name}.new"));
            fs::write(&unfinished, text).unwrap();
            fs::rename(unfinished, self.dir.join(name)).unwrap();
        }
    }

    async fn lets_in(&self, password: &str) -> bool {
        self.run::<()>(&format!("AUTH replica {password}")).await.is_ok()
    }

    /// How often a replica has been let in.
    async fn synchronisations(&self) -> u32 {
        let mut sum = 0;
        for field in ["sync_full", "sync_partial_ok"] {
            sum += self.field(field).await.parse::<u32>().unwrap();
        }
        sum
    }

    /// Ends the connection of its replica, which comes again.
    async fn loses_its_replica(&self) {
        let before = self.synchronisations().await;
        let _: i64 = self.run("CLIENT KILL TYPE replica").await.unwrap();
        eventually("a replica that is let in anew", || async {
            (self.synchronisations().await > before).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn replication_goes_on_through_another_password_whoever_hears_of_it_first() {
    let mut shard = Shard::start(2, NOTHING);
    shard.serve(1, 5, 0).await;
    let _: () = shard.members[0].run("SET key value").await.unwrap();
    shard.members[1].linked().await;
    // The primary hears of it first.
    shard.members[0].mount("second");
    eventually("a primary that lets the new password in", || async {
        shard.members[0].lets_in("second").await.then_some(())
    })
    .await;
    assert!(shard.members[0].lets_in("of-replicas").await, "and the old one, too");
    assert!(!shard.members[0].lets_in("third").await);
    shard.members[0].loses_its_replica().await;
    shard.members[1].linked().await;
    assert_eq!(
        shard.members[1].run::<Vec<String>>("CONFIG GET primaryauth").await.unwrap()[1],
        "of-replicas"
    );
    // Its pod is another one, which knows the new password alone.
    shard.members[0].kill();
    let _ = fs::remove_file(shard.members[0].dir.join("run/valkeeper-users.acl"));
    shard.members[0].start();
    shard.at_gate(0, 1).await;
    shard.promote(0, 1, 6, 0).await;
    assert!(!shard.members[0].lets_in("of-replicas").await);
    shard.have_follow(1, 0, 1, 6, 0).await;
    // Then the replica does.
    shard.members[1].mount("second");
    shard.members[1].linked().await;
    assert_eq!(shard.members[1].run::<Vec<String>>("CONFIG GET primaryauth").await.unwrap()[1], "second");
    let _: () = shard.members[0].run("SET key more").await.unwrap();
    eventually("the write at the replica", || async {
        let value = shard.members[1].run::<Option<String>>("GET key").await.unwrap();
        (value.as_deref() == Some("more")).then_some(())
    })
    .await;
}
