//! The simulated NVML, as a machine of its own: which GPUs it has, and how they are.

use std::path::Path;

use serde_json::{Value, json};

/// A simulated machine; gone with its directory.
pub struct Machine {
    directory: tempfile::TempDir,
    health: Value,
}

impl Machine {
    /// A machine with these devices (`ffi/cuda-sim/nvml/README.md`).
    pub fn new(devices: &Value) -> Machine {
        let directory = tempfile::tempdir().unwrap();
        // Built beside this test, as it is one of its dependencies.
        let library = std::env::current_exe().unwrap().with_file_name("libnvml_sim.so");
        assert!(library.exists(), "{} was not built", library.display());
        std::fs::create_dir(directory.path().join("lib")).unwrap();
        std::os::unix::fs::symlink(library, directory.path().join("lib/libnvidia-ml.so.1")).unwrap();
        std::fs::write(directory.path().join("devices.json"), devices.to_string()).unwrap();
        Machine { directory, health: json!({}) }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// What a process needs in its environment to be on this machine.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        [("CUDA_SIM_DIR", text(self.path())), ("LD_LIBRARY_PATH", text(&self.path().join("lib")))]
    }

    /// From now on the GPU with this UUID is in this state.
    pub fn set(&mut self, uuid: &str, health: Value) {
        self.health[uuid] = health;
        let new = self.path().join("new");
        std::fs::write(&new, self.health.to_string()).unwrap();
        std::fs::rename(new, self.path().join("health.json")).unwrap();
    }
}
