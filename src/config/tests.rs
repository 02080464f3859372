//! Precedence, checks, and what errors say.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::check::{Machine, load};
use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn machine() -> Machine {
    Machine { memory_bytes: 16 * GIB, name: "node-a".to_owned() }
}

fn with(args: &ServeArgs, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let environment: HashMap<&str, &str> = environment.iter().copied().collect();
    load(args, &|name| environment.get(name).map(OsString::from), &machine())
}

/// Loads a file with this text. The directory is removed afterwards.
pub(super) fn file(text: &str, args: ServeArgs, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lodestream.toml");
    std::fs::write(&path, text).unwrap();
    with(&ServeArgs { config: Some(path), ..args }, environment)
}

/// The message of the error that this file gives.
pub(super) fn refused(text: &str) -> String {
    match file(text, ServeArgs::default(), &[]) {
        Ok(_) => panic!("accepted: {text}"),
        Err(error) => {
            let error = Error::from(error);
            assert_eq!(error.code, Code::ConfigInvalid, "{text}");
            error.message
        }
    }
}

#[test]
fn without_anything_the_defaults_hold() {
    let config = with(&ServeArgs::default(), &[]).unwrap();
    assert_eq!(config, Config { node: "node-a".to_owned(), ..Config::default() });
}

#[test]
fn flag_before_environment_before_file_before_default() {
    let text = "socket = '/f'\nnode = 'f'\n[log]\nformat = 'json'\n";
    let environment = [("LODESTREAM_SOCKET", "/e"), ("LODESTREAM_NODE", "e")];
    let args = ServeArgs { socket: Some("/a".to_owned()), ..ServeArgs::default() };
    let config = file(text, args, &environment).unwrap();
    assert_eq!(config.socket, Path::new("/a"));
    assert_eq!(config.node, "e");
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.log.level, "info");
}

#[test]
fn every_variable_reaches_its_key() {
    let config = with(
        &ServeArgs::default(),
        &[
            ("LODESTREAM_NODE", "n"),
            ("LODESTREAM_SOCKET", "/s"),
            ("LODESTREAM_ROOT", "/a:/b"),
            ("LODESTREAM_STATE_DIR", "/st"),
            ("LODESTREAM_METRICS_LISTEN", "[::1]:9464"),
            ("LODESTREAM_HOST_BUDGET", "2GiB"),
            ("LODESTREAM_READY_POOL", "0"),
            ("LODESTREAM_GPU_BUDGET", "3GiB"),
            ("LODESTREAM_PAGES", "4k"),
            ("LODESTREAM_RESERVE_HUGE_PAGES", "1"),
            ("LODESTREAM_READER", "preadv2"),
            ("LODESTREAM_PRELOAD", "/m,file:///n=gpu:1"),
            ("LODESTREAM_LOG_FORMAT", "json"),
            ("LODESTREAM_LOG_LEVEL", "warn"),
        ],
    )
    .unwrap();
    let default = Config::default();
    let preload = |source: &str, device: &str| Preload {
        source: source.to_owned(),
        device: device.to_owned(),
        priority: 0,
        pin: true,
    };
    let expected = Config {
        node: "n".to_owned(),
        socket: "/s".into(),
        roots: vec!["/a".into(), "/b".into()],
        state_dir: Some("/st".into()),
        metrics_listen: Some("[::1]:9464".parse().unwrap()),
        host: Host {
            budget_bytes: 2 * GIB,
            ready_pool_bytes: 0,
            pages: Pages::Small,
            reserve_huge_pages: true,
        },
        gpu: Gpu { budget_bytes: 3 * GIB, ..Config::default().gpu },
        data_plane: DataPlane { reader: Reader::Preadv2, ..default.data_plane.clone() },
        preload: vec![preload("/m", "host"), preload("file:///n", "gpu:1")],
        log: Log { format: LogFormat::Json, level: "warn".to_owned() },
        ..default
    };
    assert_eq!(config, expected);
    assert!(flags::NAMES.len() == 14, "a new variable needs a line above");
}

#[test]
fn an_empty_variable_is_none_and_one_that_is_not_utf8_is_an_error() {
    let config =
        with(&ServeArgs::default(), &[("LODESTREAM_STATE_DIR", ""), ("LODESTREAM_CONFIG", "")]).unwrap();
    assert_eq!(config.state_dir, None);
    let not_text = |name: &str| (name == "LODESTREAM_NODE").then(|| OsString::from_vec(vec![0xff]));
    let error = load(&ServeArgs::default(), &not_text, &machine()).unwrap_err().to_string();
    assert!(
        error.contains("node") && error.contains("LODESTREAM_NODE") && error.contains("UTF-8"),
        "{error}"
    );
}

#[test]
fn errors_name_key_value_place_and_what_is_allowed() {
    let message = refused("# a comment\n[data_plane]\ndepth = 5000\n");
    for part in ["data_plane.depth", "5000", "lodestream.toml:3", "from 1 to 1024"] {
        assert!(message.contains(part), "`{part}` in: {message}");
    }
    let args = ServeArgs { pages: Some("huge".to_owned()), ..ServeArgs::default() };
    let message = with(&args, &[]).unwrap_err().to_string();
    for part in ["host.pages", "huge", "--pages", "auto, hugetlb, thp, 4k"] {
        assert!(message.contains(part), "`{part}` in: {message}");
    }
    let message = with(&ServeArgs::default(), &[("LODESTREAM_READER", "aio")]).unwrap_err().to_string();
    for part in ["data_plane.reader", "aio", "LODESTREAM_READER", "io_uring"] {
        assert!(message.contains(part), "`{part}` in: {message}");
    }
}

#[test]
fn errors_of_the_file_itself_name_the_line() {
    for (text, line, part) in [
        ("node = 'a'\nsokcet = '/s'\n", 2, "sokcet"),
        ("[host]\nbudget = '1GiB'\n", 2, "budget_bytes"),
        ("[hosts]\n", 1, "hosts"),
        ("node = 'a'\n\n[limits]\njobs_max = 1.5\n", 4, "jobs_max"),
        ("node = 'a'\nnode = 'b'\n", 2, "node"),
        ("[[preload]]\nsource = '/m'\ngpu = 1\n", 3, "gpu"),
        ("node = ", 1, "node"),
        ("host = 5\n", 1, "host"),
    ] {
        let message = refused(text);
        assert!(message.contains(&format!("lodestream.toml:{line}:")), "{text}: {message}");
        assert!(message.contains(part), "`{part}` in: {message}");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_unreadable() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("none.toml");
    let rubbish = directory.path().join("rubbish.toml");
    std::fs::write(&rubbish, [0xff, 0xfe]).unwrap();
    let long = directory.path().join("long.toml");
    std::fs::write(&long, "#".repeat(5 << 20)).unwrap();
    for path in [missing, rubbish, long, directory.path().to_path_buf()] {
        let args = ServeArgs { config: Some(path.clone()), ..ServeArgs::default() };
        let error = Error::from(with(&args, &[]).unwrap_err());
        assert_eq!(error.code, Code::ConfigUnreadable, "{error}");
        assert!(error.message.contains(&path.display().to_string()), "{error}");
    }
}

#[test]
fn values_out_of_range_are_refused() {
    for text in [
        "socket = 'run/s'",
        "socket = ''",
        "socket_mode = '0888'",
        "socket_mode = 0o1777",
        "roots = ['models']",
        "roots = ['']",
        "state_dir = 'state'",
        "metrics_listen = 'localhost'",
        "metrics_listen = '127.0.0.1'",
        "node = ''",
        "node = 'a b'",
        "drain_timeout_ms = -1",
        "drain_timeout_ms = 86400001",
        "host.budget_bytes = '63MiB'",
        "host.budget_bytes = '4GB'",
        "host.budget_bytes = -5",
        "host = { budget_bytes = '1GiB', ready_pool_bytes = '2GiB' }",
        "host.reserve_huge_pages = 'yes'",
        "data_plane.block_bytes = 0",
        "data_plane.block_bytes = '1536KiB'",
        "data_plane.block_bytes = '65MiB'",
        "data_plane.depth = 0",
        "data_plane.slots = 0",
        "data_plane.page_cache = 'always'",
        "data_plane.landing = 'somewhere'",
        "gpu.direct = 'maybe'",
        "gpu.direct_probe_timeout_ms = 99",
        "peer.listen = 'localhost'",
        "peer = { peers = ['a:1'], certificate = '/c', key = '/k', ca = '/a' }",
        "peer = { peers = ['a:1'], certificate = '/c', ca = '/a', identities = ['a'] }",
        "peer = { listen = '[::]:1', key = '/k', ca = '/a', identities = ['a'] }",
        "peer.key = 'key.pem'",
        "peer.identities = ['*.example.org']",
        "peer.identities = ['Node']",
        "peer.identities = ['spiffe://']",
        "peer.identities = ['https://a/b']",
        "peer = { peers = ['a'], certificate = '/c', key = '/k', ca = '/a', identities = ['a'] }",
        "peer = { peers = ['a:0'], certificate = '/c', key = '/k', ca = '/a', identities = ['a'] }",
        "peer = { peers = ['::1:7420'], certificate = '/c', key = '/k', ca = '/a', identities = ['a'] }",
        "peer.streams = 0",
        "peer.window = 257",
        "peer.unauthenticated_max = 0",
        "peer.chunk_timeout_ms = 99",
        "peer.tenants = ['root']",
        "limits.connections_max = 0",
        "limits.fds_per_message_max = 254",
        "limits.fds_per_message_max = 0",
        "limits.jobs_kept_max = 0",
        "limits.files_max = 4294967296",
        "limits.frame_timeout_ms = 0",
        "limits.request_bytes_max = 10",
        "log.level = 'inof'",
        "log.format = 'xml'",
        "preload = [{ device = 'host' }]",
        "preload = [{ source = 'models/a' }]",
        "preload = [{ source = '/m', device = 'gpu:' }]",
        "preload = [{ source = '/m', device = 'gpu:GPU-xyz' }]",
        "preload = [{ source = '/m', device = 'cuda:0' }]",
        "preload = [{ source = '/m', priority = 3000000000 }]",
    ] {
        let message = refused(text);
        assert!(message.contains("lodestream.toml:1"), "{text}: {message}");
        assert!(message.contains("allowed: "), "{text}: {message}");
    }
}

#[test]
fn a_socket_path_has_room_for_107_bytes() {
    let path = |bytes: usize| format!("socket = '/{}'", "s".repeat(bytes - 1));
    assert!(file(&path(107), ServeArgs::default(), &[]).is_ok());
    assert!(refused(&path(108)).contains("107"));
}

#[test]
fn a_budget_above_the_memory_says_both_figures() {
    let message = refused("host.budget_bytes = '17GiB'");
    assert!(
        message.contains(&(17 * GIB).to_string()) && message.contains(&(16 * GIB).to_string()),
        "{message}"
    );
    let small = Machine { memory_bytes: GIB, ..machine() };
    let message = load(&ServeArgs::default(), &|_| None, &small).unwrap_err().to_string();
    assert!(message.contains("the default") && message.contains("host.budget_bytes"), "{message}");
}

#[test]
fn peers_need_certificates_and_the_error_says_why() {
    let message = refused("peer.listen = '[::]:7420'");
    assert!(message.contains("peer.certificate") && message.contains("as there is peer.listen"), "{message}");
    let text = "
        [peer]
        listen = '[::]:7420'
        certificate = '/c'
        key = '/k'
        ca = '/a'
        identities = ['spiffe://example.org/node/b', 'node-c.example.org']
        peers = ['node-b:7420', '[fd00::2]:7420', '10.0.0.3:7420']
        tenants = [1000, '1001']
        ";
    let peer = file(text, ServeArgs::default(), &[]).unwrap().peer;
    assert_eq!(peer.identities, ["spiffe://example.org/node/b", "node-c.example.org"]);
    assert_eq!(peer.peers, ["node-b:7420", "[fd00::2]:7420", "10.0.0.3:7420"]);
    assert_eq!((peer.tenants, peer.window), (vec![1000, 1001], Peer::default().window));
}

#[test]
fn budget_and_pool_are_whole_huge_pages_and_an_unasked_pool_fits() {
    let text = format!("host = {{ budget_bytes = {}, ready_pool_bytes = {} }}", 101 * MIB, 3 * MIB - 1);
    let config = file(&text, ServeArgs::default(), &[]).unwrap();
    assert_eq!((config.host.budget_bytes, config.host.ready_pool_bytes), (100 * MIB, 2 * MIB));
    let config = file("host.budget_bytes = '102MiB'", ServeArgs::default(), &[]).unwrap();
    assert_eq!(config.host.ready_pool_bytes, 24 * MIB);
}

#[test]
fn preloads_are_in_order_of_priority_and_flags_replace_the_file() {
    let text = "
        preload = [
            { source = '/a' },
            { source = '/b', priority = 5, pin = false, device = 'gpu:GPU-0a1b-2c' },
            { source = '/c', priority = 5 },
            { source = '/d', priority = -1 },
        ]";
    let sources = |config: &Config| config.preload.iter().map(|p| p.source.clone()).collect::<Vec<_>>();
    let config = file(text, ServeArgs::default(), &[]).unwrap();
    assert_eq!(sources(&config), ["/b", "/c", "/a", "/d"]);
    assert_eq!((config.preload[0].device.as_str(), config.preload[0].pin), ("gpu:GPU-0a1b-2c", false));
    let args = ServeArgs { preload: vec!["/x=1=host".to_owned()], ..ServeArgs::default() };
    assert_eq!(sources(&file(text, args, &[]).unwrap()), ["/x=1"]);
    let args = ServeArgs { preload: vec!["/x=hots".to_owned()], ..ServeArgs::default() };
    let message = with(&args, &[]).unwrap_err().to_string();
    assert!(message.contains("hots") && message.contains("--preload"), "{message}");
}

#[test]
fn modes_are_octal() {
    for (text, mode) in [("'0660'", 0o660), ("0o660", 0o660), ("'0000'", 0), ("'0o600'", 0o600)] {
        let config = file(&format!("socket_mode = {text}"), ServeArgs::default(), &[]).unwrap();
        assert_eq!(config.socket_mode, mode, "{text}");
    }
}

/// Checked configurations, with every kind of value in other than its default.
fn configs() -> impl Strategy<Value = Config> {
    let path = || "/[a-z '\"é\\\\]{1,20}".prop_map(PathBuf::from);
    let preload =
        (path(), any::<i32>(), any::<bool>(), prop_oneof!["host", "gpu:[0-9]", "gpu:GPU-[0-9a-f-]{4}"]);
    let preload = preload.prop_map(|(source, priority, pin, device)| Preload {
        source: source.to_str().unwrap().to_owned(),
        device,
        priority,
        pin,
    });
    let pages = prop_oneof![Just(Pages::Auto), Just(Pages::Hugetlb), Just(Pages::Thp), Just(Pages::Small)];
    let reader = prop_oneof![Just(Reader::Auto), Just(Reader::IoUring), Just(Reader::Preadv2)];
    let places = (
        "[!-~]{1,20}",
        path(),
        0u32..=0o777,
        proptest::collection::vec(path(), 0..4),
        proptest::option::of(path()),
        proptest::option::of(any::<std::net::SocketAddrV4>().prop_map(SocketAddr::from)),
        proptest::collection::vec(preload, 0..4),
    );
    let numbers = (32u64..8192, 0u64..16, 1u64..=64, 1u32..=1024, 4096u64..=GIB, 1u32..=253);
    (places, numbers, pages, reader, any::<bool>()).prop_map(|(places, numbers, pages, reader, truth)| {
        let (node, socket, socket_mode, roots, state_dir, metrics_listen, mut preload) = places;
        let (budget, pool, block, depth, header_bytes_max, fds_per_message_max) = numbers;
        preload.sort_by_key(|entry| std::cmp::Reverse(entry.priority));
        let default = Config::default();
        Config {
            node,
            socket,
            socket_mode,
            roots,
            state_dir,
            metrics_listen,
            preload,
            ready_after_preload: truth,
            host: Host {
                budget_bytes: budget * 2 * MIB,
                ready_pool_bytes: pool * 2 * MIB,
                pages,
                reserve_huge_pages: truth,
            },
            gpu: Gpu {
                budget_bytes: pool * 2 * MIB,
                devices: vec!["GPU-1".to_owned()],
                direct: Direct::On,
                direct_probe_timeout_ms: pool + 100,
            },
            data_plane: DataPlane {
                reader,
                block_bytes: block * MIB,
                depth,
                page_cache: PageCache::Never,
                landing: Landing::Slots,
                ..default.data_plane
            },
            peer: Peer {
                listen: Some("[::1]:7420".parse().unwrap()),
                certificate: Some("/c".into()),
                key: Some("/k".into()),
                ca: Some("/a".into()),
                identities: vec!["spiffe://example.org/a".to_owned()],
                peers: vec!["b:1".to_owned()],
                tenants: vec![1000],
                window: 9,
                ..default.peer
            },
            limits: Limits { header_bytes_max, fds_per_message_max, ..default.limits },
            log: Log { format: LogFormat::Json, level: "info,a=debug".to_owned() },
            ..default
        }
    })
}

proptest! {
    #[test]
    fn what_is_printed_loads_back(config in configs()) {
        let text = config.to_toml().unwrap();
        prop_assert_eq!(file(&text, ServeArgs::default(), &[]).map_err(|e| format!("{e}\n{text}")), Ok(config));
    }

    #[test]
    fn any_text_is_a_configuration_or_an_error(text in "[a-z_\\[\\]=\"'.0-9{}, \n#-]{0,80}") {
        drop(file(&text, ServeArgs::default(), &[]));
    }
}

#[test]
fn the_document_has_every_key_with_its_default_flag_variable_and_reload() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md")).unwrap();
    let rows: HashMap<&str, Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.split('|').map(str::trim).collect::<Vec<_>>())
        .map(|cells| (cells[1].trim_matches('`'), cells))
        .collect();
    let mut expected: Vec<String> = reload::keys(&Config {
        state_dir: Some("/s".into()),
        metrics_listen: Some("[::]:1".parse().unwrap()),
        peer: Peer {
            listen: Some("[::]:1".parse().unwrap()),
            advertise: Some("a:1".to_owned()),
            certificate: Some("/c".into()),
            key: Some("/k".into()),
            ca: Some("/a".into()),
            ..Peer::default()
        },
        etcd: Etcd {
            ca: Some("/ca".into()),
            certificate: Some("/c".into()),
            key: Some("/k".into()),
            user: Some("u".to_owned()),
            password_file: Some("/p".into()),
            ..Etcd::default()
        },
        ..Config::default()
    })
    .into_keys()
    .collect();
    expected.extend(["source", "device", "priority", "pin"].map(|key| format!("preload.{key}")));
    let defaults = reload::keys(&Config::default());
    for key in &expected {
        let cells =
            rows.get(key.as_str()).unwrap_or_else(|| panic!("`{key}` has no row in docs/configuration.md"));
        assert_eq!(cells.len(), 10, "eight columns in the row of `{key}`");
        if let Some(value) = defaults.get(key).filter(|_| key != "node") {
            let value = value.to_string().replace('"', "");
            assert_eq!(cells[3].trim_matches('`'), value, "default of `{key}`");
        }
        let name = flags::NAMES.iter().find(|name| name.key == key);
        assert_eq!(cells[5].trim_matches('`'), name.map_or("–", |name| name.flag), "flag of `{key}`");
        assert_eq!(cells[6].trim_matches('`'), name.map_or("–", |name| name.env), "variable of `{key}`");
        let reload = reload::is_reloadable(key);
        if !key.starts_with("preload.") {
            assert_eq!(cells[7], if reload { "yes" } else { "no" }, "reload of `{key}`");
        }
    }
    let stale: Vec<&&str> = rows.keys().filter(|key| !expected.iter().any(|e| e == **key)).collect();
    assert!(stale.is_empty(), "rows without a key: {stale:?}");
}

#[test]
fn the_example_of_the_document_loads() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md")).unwrap();
    let (_, example) = text.split_once("```toml\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lodestream.toml");
    std::fs::write(&path, example).unwrap();
    let large = Machine { memory_bytes: 128 * GIB, ..machine() };
    let config = load(&ServeArgs { config: Some(path), ..ServeArgs::default() }, &|_| None, &large).unwrap();
    assert_eq!(config.preload.len(), 1);
}
