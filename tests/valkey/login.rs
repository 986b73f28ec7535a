//! The operator looks at a server through its agent, which lets it in: no password of a Secret is needed for that.

use crate::{
    agent::{Member, Pki},
    server::{link_by, present},
};
use valkeeper_core::info::RawRole;

#[tokio::test]
async fn an_agent_lets_its_operator_in_whatever_the_secret_says_and_whoever_deleted_the_user() {
    let pki = Pki::new();
    let member = Member::start(&pki, 0).await;
    let (wrong, _) = link_by(member.way(), member.target(), "of a Secret that was lost");
    assert!(matches!(present(&wrong).await.role, RawRole::Replica { .. }));
    for words in ["ACL DELUSER valkeeper", "ACL SETUSER valkeeper off", "ACL SETUSER valkeeper resetpass"] {
        let words = words.replace("valkeeper", crate::server::OPERATOR);
        member.run::<redis::Value>(&words).await.unwrap();
        let (anew, _) = link_by(member.way(), member.target(), "any");
        assert!(matches!(present(&anew).await.role, RawRole::Replica { .. }), "{words}");
    }
}
