//! What changes between two configurations, and what of it takes effect without a restart.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

use super::Config;

/// Keys that SIGHUP and `admin.reload` put into effect. A name that ends in a dot is a whole table.
const RELOADABLE: &[&str] = &[
    "drain_timeout_ms",
    "gpu.budget_bytes",
    "host.budget_bytes",
    "host.ready_pool_bytes",
    "limits.",
    "log.level",
    "preload",
    "ready_after_preload",
];

/// Whether a change of this key takes effect without a restart.
pub fn is_reloadable(key: &str) -> bool {
    RELOADABLE.iter().any(|known| key == *known || (known.ends_with('.') && key.starts_with(known)))
}

/// The changed keys: those that can be put into effect now, and those that need a restart.
pub fn diff_reloadable(old: &Config, new: &Config) -> (Vec<String>, Vec<String>) {
    let (old, new) = (keys(old), keys(new));
    let all: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let changed = all.into_iter().filter(|key| old.get(*key) != new.get(*key)).cloned();
    changed.partition(|key| is_reloadable(key))
}

/// Every key with its value; a list is one value. Taken from what is serialised, so that no key can be
/// forgotten: a new one needs a restart until it is named in [`RELOADABLE`].
pub(super) fn keys(config: &Config) -> BTreeMap<String, Value> {
    let mut keys = BTreeMap::new();
    // A checked configuration serialises: its paths are UTF-8 and its numbers have 63 bits.
    flatten("", Table::try_from(config).unwrap_or_default(), &mut keys);
    keys
}

fn flatten(prefix: &str, table: Table, keys: &mut BTreeMap<String, Value>) {
    for (name, value) in table {
        let key = format!("{prefix}{name}");
        match value {
            Value::Table(table) => flatten(&format!("{key}."), table, keys),
            value => drop(keys.insert(key, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Preload;

    #[test]
    fn changes_are_told_apart() {
        let old = Config::default();
        let mut new = old.clone();
        new.limits.jobs_max += 1;
        new.host.budget_bytes *= 2;
        new.log.level = "debug".to_owned();
        new.state_dir = Some("/var/lib/lodestream".into());
        new.data_plane.depth = 16;
        new.preload.push(Preload {
            source: "/m".to_owned(),
            device: "host".to_owned(),
            priority: 0,
            pin: true,
        });
        let (reloadable, restart) = diff_reloadable(&old, &new);
        assert_eq!(reloadable, ["host.budget_bytes", "limits.jobs_max", "log.level", "preload"]);
        assert_eq!(restart, ["data_plane.depth", "state_dir"]);
        assert_eq!(diff_reloadable(&new, &old).1, restart, "a key that is taken away is a change");
        assert_eq!(diff_reloadable(&new, &new), (Vec::new(), Vec::new()));
    }

    #[test]
    fn every_reloadable_name_is_a_key() {
        let keys = keys(&Config::default());
        for known in RELOADABLE {
            let found =
                keys.keys().any(|key| key == known || (known.ends_with('.') && key.starts_with(known)));
            assert!(found, "{known} is no key");
        }
    }
}
