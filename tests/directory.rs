//! The directory on a real etcd: what nodes see of each other while etcd is lost, slow, emptied, compacted, refusing or full of rubbish.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::process::{Command, Stdio};

use etcd_client::{Permission, PutOptions, Txn, TxnOp};
use lodestream::Code;
use lodestream::config;
use lodestream::peer::directory::{Address, Directory, Holder, Holding, State, Tier};

#[path = "common/etcd.rs"]
mod etcd;
#[path = "common/net.rs"]
mod net;

use etcd::{Authority, Etcd, until};
use net::Proxy;

/// So long that nothing ends by it in a test.
const LONG: u64 = 3600;

fn config(endpoint: &str, ttl_s: u64) -> config::Etcd {
    config::Etcd { endpoints: vec![endpoint.to_owned()], ttl_s, timeout_ms: 1000, ..config::Etcd::default() }
}

fn join(config: &config::Etcd, node: &str) -> Directory {
    Directory::etcd(config, node, Address::parse(&format!("{node}:7443")).unwrap()).unwrap()
}

fn digest(number: u32) -> String {
    format!("sha256:{number:064x}")
}

fn key(number: u32, node: &str) -> String {
    format!("/lodestream/artifacts/{}/{node}", digest(number))
}

fn value(node: &str) -> String {
    format!(r#"{{"version":1,"address":"{node}:7443","state":"complete","tier":"host","chunks":8,"rank":0}}"#)
}

fn holding(chunks: u64) -> Holding {
    Holding { state: State::Loading, tier: Tier::Host, chunks, rank: 3 }
}

/// The names of those who have an artifact.
fn names(directory: &Directory, number: u32) -> Vec<String> {
    directory.holders(&digest(number)).into_iter().map(|holder| holder.node.unwrap()).collect()
}

#[track_caller]
fn connected(directory: &Directory) {
    until("connection", || directory.status().connected);
}

#[track_caller]
fn lost(directory: &Directory, code: Code) {
    until("loss", || !directory.status().connected && directory.status().last_error == Some(code));
}

#[test]
fn nodes_see_what_others_have_how_far_they_are_and_when_they_leave() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let [a, b] = ["a", "b"].map(|node| join(&config(&etcd.endpoint(), LONG), node));
    a.announce(&digest(1), holding(1)).unwrap();
    until("entry", || !b.holders(&digest(1)).is_empty());
    let expected = Holder {
        node: Some("a".to_owned()),
        address: Address::parse("a:7443").unwrap(),
        holding: Some(holding(1)),
        age: None,
    };
    assert_eq!(b.holders(&digest(1)), [expected]);
    assert_eq!(b.holders(&digest(2)), []);
    let complete = Holding { state: State::Complete, tier: Tier::Gpu, ..holding(9) };
    a.announce(&digest(1), complete).unwrap();
    until("change", || b.holders(&digest(1))[0].holding == Some(complete));
    b.announce(&digest(1), holding(4)).unwrap();
    until("the other", || names(&a, 1) == ["b"]);
    assert_eq!(names(&b, 1), ["a"], "nobody sees themselves");
    let status = b.status();
    assert_eq!((status.backend, status.entries, status.announced, status.refused), ("etcd", 1, 1, 0));

    a.withdraw(&digest(1));
    until("withdrawal", || names(&b, 1).is_empty());
    a.announce(&digest(2), complete).unwrap();
    until("entry", || names(&b, 2) == ["a"]);
    drop(a);
    until("departure", || names(&b, 2).is_empty());
    assert_eq!(etcd.get(&key(2, "a")), None);
}

#[test]
fn progress_reaches_others_with_the_renewal_of_the_lease() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let [a, b] = ["a", "b"].map(|node| join(&config(&etcd.endpoint(), 2), node));
    a.announce(&digest(1), holding(1)).unwrap();
    until("entry", || names(&b, 1) == ["a"]);
    a.announce(&digest(1), holding(700)).unwrap();
    until("progress", || b.holders(&digest(1))[0].holding == Some(holding(700)));
}

#[test]
fn without_etcd_reads_go_on_and_say_how_old_they_are_and_its_return_on_the_same_data_heals() {
    let Some(mut etcd) = Etcd::start(&[]) else { return };
    let [a, b] = ["a", "b"].map(|node| join(&config(&etcd.endpoint(), LONG), node));
    a.announce(&digest(1), holding(1)).unwrap();
    a.announce(&digest(2), holding(1)).unwrap();
    until("entries", || names(&b, 1) == ["a"] && names(&b, 2) == ["a"]);
    let lease = etcd.get(&key(1, "a")).unwrap().1;

    etcd.kill();
    lost(&b, Code::DirectoryUnreachable);
    lost(&a, Code::DirectoryUnreachable);
    let holders = b.holders(&digest(1));
    assert_eq!(holders[0].holding, Some(holding(1)));
    let age = holders[0].age.unwrap();
    until("aging", || b.holders(&digest(1))[0].age.unwrap() > age);
    a.withdraw(&digest(2));
    a.announce(&digest(3), holding(1)).unwrap();

    etcd.restart();
    until("what was done meanwhile", || names(&b, 2).is_empty() && names(&b, 3) == ["a"]);
    assert_eq!((names(&b, 1), b.holders(&digest(1))[0].age), (vec!["a".to_owned()], None));
    assert_eq!(etcd.get(&key(1, "a")).unwrap().1, lease, "nothing was registered anew");
}

#[test]
fn an_etcd_that_comes_back_empty_is_told_everything_again() {
    let Some(mut etcd) = Etcd::start(&[]) else { return };
    let [a, b] = ["a", "b"].map(|node| join(&config(&etcd.endpoint(), LONG), node));
    a.announce(&digest(1), holding(1)).unwrap();
    etcd.put(&key(1, "gone"), value("gone"));
    until("entries", || names(&b, 1) == ["a", "gone"]);
    etcd.kill();
    etcd.erase();
    lost(&a, Code::DirectoryUnreachable);
    lost(&b, Code::DirectoryUnreachable);
    assert_eq!(names(&b, 1), ["a", "gone"]);
    etcd.restart();
    until("what is true now", || names(&b, 1) == ["a"]);
    b.announce(&digest(1), holding(2)).unwrap();
    until("the other way", || names(&a, 1) == ["b"]);
}

#[test]
fn an_etcd_that_does_not_answer_holds_up_nobody_and_heals_when_it_does() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let [a, b] = ["a", "b"].map(|node| join(&config(&etcd.endpoint(), 5), node));
    a.announce(&digest(1), holding(1)).unwrap();
    until("entry", || names(&b, 1) == ["a"]);
    etcd.stop();
    // Whatever is asked of the directory meanwhile is answered: a read that waited for etcd would wait for ever.
    a.announce(&digest(2), holding(1)).unwrap();
    lost(&b, Code::DirectoryTimeout);
    assert_eq!(names(&b, 1), ["a"]);
    assert!(b.holders(&digest(1))[0].age.is_some());
    etcd.go_on();
    until("healing", || names(&b, 2) == ["a"] && names(&b, 1) == ["a"] && b.status().connected);
}

#[test]
fn of_several_endpoints_one_that_works_is_found() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let dead = "http://127.0.0.1:1".to_owned();
    let endpoints = vec![dead.clone(), etcd.endpoint(), dead];
    let config = config::Etcd { endpoints, ..config("", LONG) };
    // Several: where one begins is left to chance.
    let nodes: Vec<_> = (0..8).map(|at| join(&config, &format!("n{at}"))).collect();
    nodes.iter().for_each(connected);
}

#[test]
fn changes_that_were_compacted_away_while_a_node_was_cut_off_are_listed() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let mut proxy = Proxy::start(&etcd.address());
    let a = join(&config(&etcd.endpoint(), LONG), "a");
    let b = join(&config(&format!("http://{}", proxy.address()), LONG), "b");
    b.announce(&digest(9), holding(1)).unwrap();
    for number in [1, 2] {
        a.announce(&digest(number), holding(1)).unwrap();
        until("entry", || names(&b, number) == ["a"]);
    }
    until("entry", || names(&a, 9) == ["b"]);
    let lease = etcd.get(&key(9, "b")).unwrap().1;
    proxy.tell("cut");
    lost(&b, Code::DirectoryUnreachable);
    a.withdraw(&digest(1));
    a.announce(&digest(3), holding(1)).unwrap();
    until("changes", || etcd.get(&key(1, "a")).is_none() && etcd.get(&key(3, "a")).is_some());
    etcd.compact();
    assert_eq!(names(&b, 1), ["a"], "the last known state");
    proxy.tell("restore");
    until("the new state", || names(&b, 1).is_empty() && names(&b, 2) == ["a"] && names(&b, 3) == ["a"]);
    assert_eq!(etcd.get(&key(9, "b")).unwrap().1, lease, "the lease is the same");
    a.announce(&digest(4), holding(1)).unwrap();
    until("changes after that", || names(&b, 4) == ["a"]);
}

#[test]
fn a_stalled_connection_is_given_up() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let mut proxy = Proxy::start(&etcd.address());
    let a = join(&config(&format!("http://{}", proxy.address()), 2), "a");
    a.announce(&digest(1), holding(1)).unwrap();
    until("entry", || etcd.get(&key(1, "a")).is_some());
    proxy.tell("stall");
    lost(&a, Code::DirectoryTimeout);
    until("the end of its lease", || etcd.get(&key(1, "a")).is_none());
    proxy.tell("go");
    until("the entry again", || etcd.get(&key(1, "a")).is_some());
}

/// Not a test of its own: the process that the next one kills.
#[test]
#[ignore = "run by `a_node_that_is_killed_disappears_with_its_lease`"]
fn node_to_be_killed() {
    let endpoint = std::env::var_os("LODESTREAM_TEST_ENDPOINT").unwrap().into_string().unwrap();
    let dying = join(&config(&endpoint, 2), "dying");
    dying.announce(&digest(1), holding(1)).unwrap();
    until("the end of this process", || false);
}

#[test]
fn a_node_that_is_killed_disappears_with_its_lease() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let b = join(&config(&etcd.endpoint(), LONG), "b");
    let mut node = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "node_to_be_killed"])
        .env("LODESTREAM_TEST_ENDPOINT", etcd.endpoint())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until("entry", || names(&b, 1) == ["dying"]);
    node.kill().unwrap();
    node.wait().unwrap();
    until("its end", || names(&b, 1).is_empty());
}

#[test]
fn keys_of_an_earlier_life_are_removed_and_those_that_somebody_removed_come_back() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    // Of the same node, which died with a lease that still has an hour.
    etcd.request(async |mut client| {
        let lease = client.lease_grant(3600, None).await?.id();
        for number in [1, 2] {
            client.put(key(number, "a"), value("a"), Some(PutOptions::new().with_lease(lease))).await?;
        }
        Ok(())
    });
    let a = join(&config(&etcd.endpoint(), LONG), "a");
    a.announce(&digest(2), holding(5)).unwrap();
    let text = |number| etcd.get(&key(number, "a")).map(|(value, _)| String::from_utf8(value).unwrap());
    until("what is true now", || {
        text(1).is_none() && text(2).is_some_and(|text| text.contains("\"chunks\":5"))
    });
    etcd.delete(&key(2, "a"));
    until("its return", || text(2).is_some());
}

#[test]
fn certificates_are_checked_on_both_sides() {
    let Some(etcd) = Etcd::start_with_tls() else { return };
    let authority = etcd.authority();
    let (certificate, key) = authority.issue("node");
    let good = config::Etcd {
        ca: Some(authority.ca()),
        certificate: Some(certificate),
        key: Some(key),
        ..config(&etcd.endpoint(), LONG)
    };
    connected(&join(&good, "a"));

    let other = Authority::new();
    let wrong = config::Etcd { ca: Some(other.ca()), ..good.clone() };
    lost(&join(&wrong, "b"), Code::DirectoryUnreachable);

    let (certificate, key) = other.issue("stranger");
    let stranger = config::Etcd { certificate: Some(certificate), key: Some(key), ..good.clone() };
    lost(&join(&stranger, "c"), Code::DirectoryUnreachable);

    let nobody = config::Etcd { certificate: None, key: None, ..good.clone() };
    lost(&join(&nobody, "d"), Code::DirectoryUnreachable);

    // A file that is replaced is taken up without a restart.
    let ca = etcd.directory().join("ca.pem");
    fs::copy(other.ca(), &ca).unwrap();
    let replaced = join(&config::Etcd { ca: Some(ca.clone()), ..good.clone() }, "e");
    lost(&replaced, Code::DirectoryUnreachable);
    fs::copy(authority.ca(), &ca).unwrap();
    connected(&replaced);

    let missing = config::Etcd { ca: Some("/does/not/exist".into()), ..good };
    let error = Directory::etcd(&missing, "f", Address::parse("f:1").unwrap()).unwrap_err();
    assert_eq!(error.code(), Code::DirectoryCredentials);
    assert!(error.to_string().contains("/does/not/exist"), "{error}");
}

#[test]
fn a_user_needs_the_password_and_the_rights() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let password = etcd.directory().join("password");
    let user = |user: &str| config::Etcd {
        user: Some(user.to_owned()),
        password_file: Some(password.clone()),
        ..config(&etcd.endpoint(), LONG)
    };
    fs::write(&password, "any").unwrap();
    let early = join(&user("node"), "early");
    lost(&early, Code::DirectoryDenied);
    drop(early);
    etcd.request(async |mut client| {
        for (user, password) in [("root", "secret"), ("node", "right"), ("guest", "right")] {
            client.user_add(user, password, None).await?;
        }
        client.role_add("root").await?;
        client.user_grant_role("root", "root").await?;
        let below = "/lodestream/";
        for (role, user, permission) in
            [("nodes", "node", Permission::read_write(below)), ("guests", "guest", Permission::read(below))]
        {
            client.role_add(role).await?;
            client.role_grant_permission(role, permission.with_prefix()).await?;
            client.user_grant_role(user, role).await?;
        }
        client.auth_enable().await
    });
    fs::write(&password, "wrong\n").unwrap();
    let a = join(&user("node"), "a");
    lost(&a, Code::DirectoryDenied);
    let stranger = join(&config(&etcd.endpoint(), LONG), "b");
    lost(&stranger, Code::DirectoryDenied);

    fs::write(&password, "right\n").unwrap();
    connected(&a);
    a.announce(&digest(1), holding(1)).unwrap();
    let b = join(&user("node"), "b");
    until("entry", || names(&b, 1) == ["a"]);

    let guest = join(&user("guest"), "c");
    connected(&guest);
    guest.announce(&digest(2), holding(1)).unwrap();
    until("refusal", || guest.status().last_error == Some(Code::DirectoryDenied));
    assert_eq!(names(&b, 2), [""; 0]);
}

#[test]
fn rubbish_in_etcd_is_counted_and_left_alone() {
    // An etcd that takes what no node would write.
    let Some(etcd) = Etcd::start(&["--max-request-bytes=16777216"]) else { return };
    etcd.put(&key(1, "good"), value("good"));
    let rubbish = |node: &str, value: Vec<u8>| (key(1, node), value);
    let mut all = vec![
        rubbish("not-json", b"{".to_vec()),
        rubbish("not-text", vec![0xff; 40]),
        rubbish("later", value("later").replace("\"version\":1", "\"version\":2").into()),
        rubbish("address", value("address").replace("address:7443", "0.0.0.0:0").into()),
        rubbish("field", value("field").replace("\"rank\"", "\"rkey\"").into()),
        rubbish("number", value("number").replace("\"chunks\":8", "\"chunks\":18446744073709551615").into()),
        ("/lodestream/artifacts/".to_owned(), b"x".to_vec()),
        ("/lodestream/artifacts/sha256:00/a".to_owned(), value("a").into()),
        (format!("{} ", key(1, "space")), value("space").into()),
        (key(1, ""), value("none").into()),
    ];
    // Longer together than one answer may be, and one that is so alone.
    all.extend((0..6).map(|at| rubbish(&format!("large{at}"), vec![b'x'; 1 << 20])));
    all.push(rubbish("huge", vec![b'x'; 6 << 20]));
    for (key, value) in &all {
        etcd.put(key, value.as_slice());
    }
    let count = u64::try_from(all.len()).unwrap();
    etcd.put("/elsewhere/artifacts", "not looked at");
    etcd.put("/lodestream/artifactsx", "not looked at");

    let a = join(&config(&etcd.endpoint(), LONG), "a");
    connected(&a);
    assert_eq!(names(&a, 1), ["good"]);
    assert_eq!((a.status().refused, a.status().entries), (count, 1));

    // The same while it is connected, each by the watch.
    let before = a.status().refused;
    for (key, value) in all.iter().filter(|(_, value)| value.len() < 1 << 20) {
        etcd.put(key, value.as_slice());
    }
    let small = u64::try_from(all.iter().filter(|(_, value)| value.len() < 1 << 20).count()).unwrap();
    until("counts", || a.status().refused == before + small);
    etcd.put(&key(1, "other"), value("other"));
    until("what is good", || names(&a, 1) == ["good", "other"]);
    etcd.put(&key(1, "good"), "turned bad");
    until("what is no longer good", || names(&a, 1) == ["other"]);
    // One that breaks the watch is gone around.
    etcd.put(&key(2, "huge"), vec![b'x'; 6 << 20]);
    etcd.put(&key(2, "after"), value("after"));
    until("what came after it", || names(&a, 2) == ["after"]);
    assert_eq!(names(&a, 1), ["other"]);
}

#[test]
fn a_listing_of_many_pages_is_whole() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let nodes: Vec<String> = (0..1300).map(|at| format!("n{at:04}")).collect();
    for nodes in nodes.chunks(100) {
        let puts: Vec<_> = nodes.iter().map(|node| TxnOp::put(key(1, node), value(node), None)).collect();
        etcd.request(async |mut client| client.txn(Txn::new().and_then(puts)).await);
    }
    let a = join(&config(&etcd.endpoint(), LONG), "a");
    connected(&a);
    assert_eq!(names(&a, 1), nodes);
}

#[test]
fn many_announcements_are_all_written() {
    let Some(etcd) = Etcd::start(&[]) else { return };
    let [a, b] = ["a", "b"].map(|node| join(&config(&etcd.endpoint(), LONG), node));
    for number in 0..300 {
        a.announce(&digest(number), holding(1)).unwrap();
    }
    until("all of them", || b.status().entries == 300);
    for number in 0..300 {
        a.withdraw(&digest(number));
    }
    until("none of them", || b.status().entries == 0);
}
