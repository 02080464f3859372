//! The flags of `lodestream serve`, and the name of each in the environment and in the file.
//!
//! Flags are taken as text here and checked in one place with what the environment and the file say, so that
//! an error reads the same wherever the value came from. clap's own `env` is not used for the same reason: it
//! does not say whether a value came from a flag or from the environment.

use std::path::PathBuf;

use clap::Args;

/// Flags of `lodestream serve`. Precedence: flag, then environment, then file, then default.
#[derive(Debug, Clone, Default, Args)]
pub struct ServeArgs {
    /// Configuration file (TOML) [env: LODESTREAM_CONFIG]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Print the effective configuration as TOML and exit
    #[arg(long)]
    pub check_config: bool,

    /// Where the API listens [env: LODESTREAM_SOCKET]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,

    /// Directory below which clients may name paths; repeatable [env: LODESTREAM_ROOT, separated by colons]
    #[arg(long, value_name = "DIR")]
    pub root: Vec<String>,

    /// Most memory for resident artifacts, such as 4GiB [env: LODESTREAM_HOST_BUDGET]
    #[arg(long, value_name = "SIZE")]
    pub host_budget: Option<String>,

    /// Memory kept ready for the next load, inside the budget [env: LODESTREAM_READY_POOL]
    #[arg(long, value_name = "SIZE")]
    pub ready_pool: Option<String>,

    /// Most memory of each GPU for resident artifacts; 0 leaves GPUs alone [env: LODESTREAM_GPU_BUDGET]
    #[arg(long, value_name = "SIZE")]
    pub gpu_budget: Option<String>,

    /// Where manifests are kept from one run to the next [env: LODESTREAM_STATE_DIR]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<String>,

    /// Where /metrics, /live and /ready are served [env: LODESTREAM_METRICS_LISTEN]
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics_listen: Option<String>,

    /// Artifact made resident at start; repeatable; what follows the last `=` is the device [env: LODESTREAM_PRELOAD, separated by commas]
    #[arg(long, value_name = "URI[=DEVICE]")]
    pub preload: Vec<String>,

    /// Memory pages: auto, hugetlb, thp or 4k [env: LODESTREAM_PAGES]
    #[arg(long, value_name = "KIND")]
    pub pages: Option<String>,

    /// Let the daemon raise the kernel's number of huge pages up to its budget [env: LODESTREAM_RESERVE_HUGE_PAGES]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub reserve_huge_pages: Option<String>,

    /// How files are read: auto, io_uring or preadv2 [env: LODESTREAM_READER]
    #[arg(long, value_name = "READER")]
    pub reader: Option<String>,

    /// Form of the log: text or json [env: LODESTREAM_LOG_FORMAT]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,

    /// Log filter, such as info or info,lodestream::tier=debug [env: LODESTREAM_LOG_LEVEL]
    #[arg(long, value_name = "FILTER")]
    pub log_level: Option<String>,

    /// Name of this node; default: the host name [env: LODESTREAM_NODE]
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
}

/// A setting that can be given in three places.
#[derive(Debug, Clone, Copy)]
pub(super) struct Name {
    /// Key in the file.
    pub(super) key: &'static str,
    /// Flag of `lodestream serve`.
    pub(super) flag: &'static str,
    /// Variable of the environment.
    pub(super) env: &'static str,
}

macro_rules! names {
    ($($constant:ident: $key:literal, $flag:literal, $env:literal;)*) => {
        $(pub(super) const $constant: Name = Name { key: $key, flag: $flag, env: $env };)*
        /// All of them.
        #[cfg(test)]
        pub(super) const NAMES: &[Name] = &[$($constant,)*];
    };
}

names! {
    NODE: "node", "--node", "LODESTREAM_NODE";
    SOCKET: "socket", "--socket", "LODESTREAM_SOCKET";
    ROOTS: "roots", "--root", "LODESTREAM_ROOT";
    STATE_DIR: "state_dir", "--state-dir", "LODESTREAM_STATE_DIR";
    METRICS_LISTEN: "metrics_listen", "--metrics-listen", "LODESTREAM_METRICS_LISTEN";
    HOST_BUDGET: "host.budget_bytes", "--host-budget", "LODESTREAM_HOST_BUDGET";
    READY_POOL: "host.ready_pool_bytes", "--ready-pool", "LODESTREAM_READY_POOL";
    GPU_BUDGET: "gpu.budget_bytes", "--gpu-budget", "LODESTREAM_GPU_BUDGET";
    PAGES: "host.pages", "--pages", "LODESTREAM_PAGES";
    RESERVE_HUGE_PAGES: "host.reserve_huge_pages", "--reserve-huge-pages", "LODESTREAM_RESERVE_HUGE_PAGES";
    READER: "data_plane.reader", "--reader", "LODESTREAM_READER";
    PRELOAD: "preload", "--preload", "LODESTREAM_PRELOAD";
    LOG_FORMAT: "log.format", "--log-format", "LODESTREAM_LOG_FORMAT";
    LOG_LEVEL: "log.level", "--log-level", "LODESTREAM_LOG_LEVEL";
}

/// The variable that names the file, for where `--config` is not given.
pub(super) const CONFIG_ENV: &str = "LODESTREAM_CONFIG";

#[cfg(test)]
mod tests {
    use clap::{Command, FromArgMatches};

    use super::*;

    fn parse(arguments: &[&str]) -> ServeArgs {
        let command = ServeArgs::augment_args(Command::new("serve").no_binary_name(true));
        ServeArgs::from_arg_matches(&command.try_get_matches_from(arguments).unwrap()).unwrap()
    }

    #[test]
    fn each_flag_has_a_key_and_a_variable_that_its_help_names() {
        let command = ServeArgs::augment_args(Command::new("serve").disable_help_flag(true));
        let flags: Vec<String> =
            command.get_arguments().filter_map(|a| a.get_long().map(|l| format!("--{l}"))).collect();
        let with_key = |flag: &&String| *flag != "--config" && *flag != "--check-config";
        assert_eq!(flags.iter().filter(with_key).count(), NAMES.len());
        for name in NAMES {
            let long = name.flag.trim_start_matches("--");
            let argument = command.get_arguments().find(|a| a.get_long() == Some(long)).expect(name.flag);
            let help = argument.get_help().unwrap().to_string();
            assert!(help.contains(&format!("[env: {}", name.env)), "{}: {help}", name.flag);
        }
    }

    #[test]
    fn repeats_and_optional_values() {
        let args = parse(&["--root", "/a", "--root", "/b", "--reserve-huge-pages", "--preload", "/m=host"]);
        assert_eq!(args.root, ["/a", "/b"]);
        assert_eq!(args.reserve_huge_pages.as_deref(), Some("true"));
        assert_eq!(args.preload, ["/m=host"]);
        assert_eq!(parse(&["--reserve-huge-pages=false"]).reserve_huge_pages.as_deref(), Some("false"));
    }
}
