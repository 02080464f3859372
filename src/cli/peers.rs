//! `lodestream peers`: the other nodes that artifacts come from and go to.

use super::Context;
use super::output::{Column, bytes, printable, table};
use crate::api::methods::PeersReply;
use crate::error::Result;

pub(super) fn run(context: &Context) -> Result<()> {
    let peers = context.connect()?.peers()?;
    context.output.result(&peers, || text(&peers))
}

fn text(reply: &PeersReply) -> String {
    let directory = &reply.directory;
    let how = match (directory.connected, &directory.last_error) {
        (true, _) => String::new(),
        (false, None) => ", not connected".to_owned(),
        (false, Some(code)) => format!(", not connected ({})", printable(code)),
    };
    let mut text =
        format!("directory   {}: {} entries{how}\n", printable(&directory.backend), directory.entries);
    match &reply.listen {
        None => text.push_str("serves      nobody: peer.listen is not set\n"),
        Some(listen) => text.push_str(&format!(
            "serves      {} artifacts at {}: {} connections, {} sent\n",
            reply.offers,
            printable(listen),
            reply.connections,
            bytes(reply.sent_bytes)
        )),
    }
    if reply.peers.is_empty() {
        return text;
    }
    let columns = [
        Column::Left("PEER"),
        Column::Left("NODE"),
        Column::Right("CAME"),
        Column::Right("JOBS"),
        Column::Right("LEFT"),
        Column::Left("WHY"),
    ];
    let rows = reply.peers.iter().map(|peer| {
        vec![
            peer.address.clone(),
            peer.node.clone(),
            bytes(peer.bytes),
            peer.jobs.to_string(),
            peer.left.to_string(),
            peer.last_error.clone().unwrap_or_default(),
        ]
    });
    text.push('\n');
    text + &table(&columns, rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::methods::{DirectoryStatus, PeerStatus};

    #[test]
    fn it_says_who_gave_what_and_who_is_served() {
        let directory = DirectoryStatus {
            backend: "etcd".to_owned(),
            connected: false,
            entries: 3,
            announced: 1,
            refused: 0,
            last_error: Some("directory.timeout".to_owned()),
        };
        let peer = PeerStatus {
            address: "node-b:7471".to_owned(),
            node: "b".to_owned(),
            bytes: 1 << 30,
            jobs: 2,
            left: 1,
            last_error: Some("peer.timeout".to_owned()),
        };
        let reply = PeersReply {
            listen: Some("[::]:7471".to_owned()),
            offers: 1,
            connections: 4,
            sent_bytes: 1 << 20,
            directory,
            peers: vec![peer],
        };
        let expected = "\
directory   etcd: 3 entries, not connected (directory.timeout)
serves      1 artifacts at [::]:7471: 4 connections, 1.00 MiB sent

PEER         NODE      CAME  JOBS  LEFT  WHY
node-b:7471  b     1.00 GiB     2     1  peer.timeout
";
        assert_eq!(text(&reply), expected);
        assert!(text(&PeersReply { listen: None, ..reply }).contains("nobody: peer.listen is not set"));
    }
}
