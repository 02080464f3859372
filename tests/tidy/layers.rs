//! Which module may use which, and the `use` of a file as paths.

/// What everything may use.
const COMMON: &[&str] = &["error", "config", "telemetry"];

/// The types of the API, its framing and its descriptors: what both ends of the socket share.
const API: &[&str] = &["api::methods", "api::call", "api::wire", "api::scm", "api::schema"];

/// What the running daemon is made of.
const NODE: &[&str] = &[
    "topology", "transfer", "probe", "peer", "tier", "catalog", "source", "plan", "shard", "staging", "sys",
    "checksum",
];

/// (module, what it may use beside itself and [`COMMON`]). The longest entry that matches a file decides. The order is
/// the way of a byte: a layer calls only what stands below it in this list, and shares the API's types.
const LAYERS: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    ("cli::serve", &["daemon", "cli"]),
    ("cli::doctor::peer", &["cli", "peer"]),
    ("cli::doctor", &["cli", "topology", "measure", "probe", "staging", "sys"]),
    (
        "cli::bench",
        &["cli", "client", "API", "topology", "measure", "sys::mem", "sys::page_cache", "sys::warm"],
    ),
    ("cli::plan", &["cli", "plan"]),
    ("cli", &["client", "API", "topology", "probe"]),
    ("client", &["API", "sys::cuda", "sys::map", "sys::peer", "topology"]),
    ("in_process", &["API", "client", "daemon"]),
    ("daemon", &["api", "node", "NODE", "json"]),
    ("api::methods", &["topology"]),
    ("api::call", &["API", "topology"]),
    ("api::wire", &["API"]),
    ("api::scm", &[]),
    ("api::schema", &["API", "topology"]),
    ("api", &["node", "topology", "transfer", "tier", "catalog", "source", "sys", "json"]),
    ("node", &["API", "NODE", "json"]),
    ("transfer", &["API", "NODE", "json"]),
    ("peer::fetch", &["plan", "shard", "catalog", "checksum", "sys"]),
    ("peer::directory", &["json"]),
    ("probe", &["plan", "shard", "sys"]),
    ("peer", &["catalog", "checksum", "sys"]),
    ("tier", &["API", "peer::offered", "catalog", "plan", "source", "sys", "checksum", "json"]),
    ("catalog", &["API", "source", "sys", "checksum", "json"]),
    ("source", &["sys", "json"]),
    ("plan", &["catalog", "checksum"]),
    ("shard", &["peer::offer", "plan", "staging", "sys", "checksum"]),
    ("measure", &["staging", "topology", "sys", "checksum"]),
    ("staging", &["sys"]),
    ("rdma", &["sys"]),
    ("topology", &["sys"]),
    ("sys", &[]),
    ("checksum", &[]),
    ("json", &[]),
    ("telemetry::gpu", &["sys::nvml"]),
    ("telemetry", &["API"]),
    ("config", &[]),
    ("error", &[]),
];

/// Why `module` may not use `target`, if it may not.
pub(crate) fn refusal(module: &[&str], target: &str) -> Option<String> {
    let own = module.join("::");
    if below(target, module[0]) && module[0] != "api" {
        return None;
    }
    let Some((name, allowed)) =
        LAYERS.iter().filter(|(name, _)| below(&own, name)).max_by_key(|(name, _)| name.len())
    else {
        return Some(format!(
            "module `{own}` has no place in the layers: give it one in tests/tidy/layers.rs"
        ));
    };
    let allows = |entry: &str| match entry {
        "API" => API.iter().any(|part| below(target, part)),
        "NODE" => NODE.iter().any(|part| below(target, part)),
        module => below(target, module),
    };
    // `config` and `error` are the floor: they may not use what uses them.
    let common = !["config", "error"].contains(name) || target.starts_with("error");
    let permitted = below(target, name)
        || (common && COMMON.iter().any(|entry| below(target, entry)))
        || allowed.iter().any(|entry| allows(entry));
    (!permitted).then(|| {
        format!(
            "`{name}` may use only {allowed:?} and {COMMON:?} (a layer calls only what lies below it: \
             docs/architecture.md), not `{target}`"
        )
    })
}

fn below(path: &str, module: &str) -> bool {
    path == module || path.strip_prefix(module).is_some_and(|rest| rest.starts_with("::"))
}

/// Paths below `root` (`crate` or `lodestream`) that the code names: (offset, `module::item`), groups opened.
pub(crate) fn uses(code: &str, root: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for at in super::source::words(code, root) {
        if let Some(rest) = code[at + root.len()..].strip_prefix("::") {
            for path in tree(rest, &mut 0) {
                found.push((at, path));
            }
        }
    }
    // `crate::Error` and the like: re-exports of the root, which are of `error`.
    for (_, path) in &mut found {
        if path.starts_with(|c: char| c.is_ascii_uppercase()) {
            path.insert_str(0, "error::");
        }
    }
    found
}

/// The paths of a use tree such as `api::{methods::Source, wire}`; `at` moves to its end.
fn tree(text: &str, at: &mut usize) -> Vec<String> {
    let mut prefix = String::new();
    loop {
        let rest = text[*at..].trim_start();
        *at = text.len() - rest.len();
        let name: String =
            rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == '*').collect();
        *at += name.len();
        prefix.push_str(&name);
        if rest.starts_with('{') {
            *at += 1;
            return group(text, at).into_iter().map(|path| format!("{prefix}{path}")).collect();
        }
        if name.is_empty() || !text[*at..].starts_with("::") {
            return vec![prefix.trim_end_matches("::").to_owned()];
        }
        *at += 2;
        prefix.push_str("::");
    }
}

fn group(text: &str, at: &mut usize) -> Vec<String> {
    let mut paths = Vec::new();
    while *at < text.len() {
        let rest = text[*at..].trim_start();
        *at = text.len() - rest.len();
        if rest.starts_with('}') {
            *at += 1;
            break;
        }
        let begin = *at;
        paths.extend(tree(text, at).into_iter().filter(|path| !path.is_empty()));
        // The rest of the entry: ` as Name`, then the comma.
        while *at < text.len() && !text[*at..].starts_with([',', '}']) {
            *at += text[*at..].chars().next().map_or(1, char::len_utf8);
        }
        if text[*at..].starts_with(',') {
            *at += 1;
        }
        debug_assert!(*at > begin || text[*at..].starts_with('}'));
    }
    paths
}
