//! Tests that are processes of a simulated machine: a test runs itself again where libcuda is the simulated one.

#![allow(clippy::unwrap_used, reason = "a test whose processes cannot be run has failed")]

use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::library;

/// Says to a process that it is one of the machine, and which part of its test it does.
const PART: &str = "CUDA_SIM_TEST_PART";

/// A simulated machine.
pub(crate) struct Machine {
    directory: TempDir,
    variables: Vec<(&'static str, String)>,
}

impl Machine {
    pub(crate) fn new(devices: &str) -> Machine {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let variables = vec![("CUDA_SIM_DEVICES", devices.to_owned())];
        Machine { directory, variables }
    }

    /// Sets a variable for the processes that come.
    pub(crate) fn with(mut self, name: &'static str, value: &str) -> Machine {
        self.variables.push((name, value.to_owned()));
        self
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Starts a process that does a part of a test.
    pub(crate) fn start(&self, test: &str, part: &str) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture"])
            .env("LD_LIBRARY_PATH", library::directory())
            .env("CUDA_SIM_DIR", self.path())
            .env(PART, part)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs a process that does a part of a test, which must pass.
    pub(crate) fn run(&self, test: &str, part: &str) {
        let output = self.start(test, part).wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{part}: {said}");
    }
}

/// Which part this process does; none: it is the test itself.
#[allow(clippy::disallowed_methods, reason = "how a test process knows which one it is")]
pub(crate) fn part() -> Option<String> {
    std::env::var(PART).ok()
}

/// Runs the one part of a test, on a machine.
pub(crate) fn alone<B: FnOnce()>(machine: impl FnOnce() -> Machine, body: B) {
    match part() {
        Some(_) => body(),
        None => machine().run(test_of(std::any::type_name::<B>()), "alone"),
    }
}

/// The test that something stands in, by its path: `behaviour::the_test::{{closure}}`.
pub(crate) fn test_of(path: &str) -> &str {
    path.split("::").nth(1).unwrap()
}

/// The name of the test that this stands in.
macro_rules! this_test {
    () => {{
        fn here() {}
        $crate::process::test_of(std::any::type_name_of_val(&here))
    }};
}
pub(crate) use this_test;
