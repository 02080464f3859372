//! The C ABI: real C programs, compiled as strictly as a compiler can, against a real daemon; also under AddressSanitizer and
//! under valgrind.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot set up has failed")]
#![allow(clippy::print_stderr, reason = "what a skipped test has to say")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::daemon::Daemon;
use common::directory;
use common::model::Model;
use serde_json::json;

/// The library, header and pkg-config file as a user has them, and programs that were compiled with them.
struct Prefix {
    directory: tempfile::TempDir,
}

impl Prefix {
    fn install() -> Prefix {
        let prefix = Prefix { directory: directory() };
        let install = concat!(env!("CARGO_MANIFEST_DIR"), "/ffi/c/install");
        // Where cargo puts what the tests only depend on.
        let build = Path::new(env!("CARGO_BIN_EXE_lodestream")).parent().unwrap().join("deps");
        succeeded(Command::new(install).arg(prefix.path("")).arg(build));
        // Without what debuggers want, which valgrind would read for minutes.
        succeeded(
            Command::new("strip")
                .arg("--strip-debug")
                .arg(prefix.path(concat!("lib/liblodestream.so.", env!("CARGO_PKG_VERSION")))),
        );
        prefix
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Compiles a C program below ffi/c as C11, each warning an error.
    fn compile(&self, source: &str, name: &str, more: &[&str]) -> PathBuf {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("ffi/c").join(source);
        let program = self.path(name);
        let mut compiler = Command::new("cc");
        compiler.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-g"]).args(more);
        compiler.arg("-I").arg(self.path("include")).arg(source).arg("-o").arg(&program);
        compiler.arg("-L").arg(self.path("lib")).args(["-llodestream", "-lm"]);
        succeeded(&mut compiler);
        program
    }

    fn run(&self, program: &Path, arguments: &[&Path]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).env("LD_LIBRARY_PATH", self.path("lib")).output().unwrap()
    }
}

#[track_caller]
fn succeeded(command: &mut Command) -> String {
    let output = command.output().unwrap();
    ok(&output, &format!("{command:?}"))
}

#[track_caller]
fn ok(output: &Output, what: &str) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {}\n{errors}", output.status);
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What the example has to print for a model.
fn expected(model: &Model) -> Vec<String> {
    let fnv = |bytes: Vec<u8>| {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        })
    };
    let line = |tensor: &common::model::Tensor| {
        let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
        let sum = fnv(tensor.contents(model.seed));
        format!("{} {} [{}] {} {sum:016x}", tensor.name, tensor.dtype, shape.join(", "), tensor.bytes)
    };
    let mut lines: Vec<String> = model.tensors.iter().map(line).collect();
    lines.sort();
    lines
}

fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn c_programs_read_every_tensor_and_careless_ones_are_told_what_is_wrong() {
    let root = directory();
    let model = Model::mixed(&root.path().join("m"), 60);
    let other = Model::mixed(&root.path().join("n"), 61);
    let mut daemon = Daemon::start(root.path());
    // Once for everything: a library that was built for debugging is large.
    let prefix = Prefix::install();
    let example = prefix.compile("examples/attach.c", "attach", &[]);
    let misuse = prefix.compile("tests/misuse.c", "misuse", &[]);
    let arguments = [daemon.socket.as_path(), model.path.as_path()];
    assert_eq!(sorted(&ok(&prefix.run(&example, &arguments), "attach")), expected(&model));
    let select = [arguments[0], arguments[1], Path::new(r#"{"select": ["head.*"]}"#)];
    assert_eq!(ok(&prefix.run(&example, &select), "attach").lines().count(), 1);
    let refused = prefix.run(&example, &[arguments[0], Path::new("/nonexistent")]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("[source.file."), "{refused:?}");
    let careless = [daemon.socket.as_path(), other.path.as_path()];
    ok(&prefix.run(&misuse, &careless), "misuse");

    pkg_config(&prefix);
    evict(&daemon, &other);
    address_sanitizer(&prefix, &arguments, &careless);
    evict(&daemon, &other);
    valgrind(&prefix, [(&example, &arguments), (&misuse, &careless)]);

    // Linked into the program whole.
    std::fs::remove_file(prefix.path("lib/liblodestream.so")).unwrap();
    let whole = prefix.compile("examples/attach.c", "whole", &[]);
    assert_eq!(sorted(&ok(&prefix.run(&whole, &arguments), "linked whole")), expected(&model));
    evict(&daemon, &model);
    evict(&daemon, &other);
    daemon.assert_idle();
}

/// Evicts a model and the selections of it that the programs have attached.
fn evict(daemon: &Daemon, model: &Model) {
    for select in [serde_json::Value::Null, json!(["head.*"]), json!(["embed.*"])] {
        // What is not resident is gone as well.
        drop(daemon.connect().call("artifact.evict", &json!({"source": model.path, "select": select})));
    }
}

fn pkg_config(prefix: &Prefix) {
    let mut command = Command::new("pkg-config");
    command.args(["--cflags", "--libs", "lodestream"]).env("PKG_CONFIG_PATH", prefix.path("lib/pkgconfig"));
    let Ok(output) = command.output() else {
        eprintln!("skipped: pkg-config is not installed");
        return;
    };
    let flags = ok(&output, "pkg-config");
    assert!(flags.contains("-llodestream") && flags.contains("/include"), "{flags}");
}

fn address_sanitizer(prefix: &Prefix, attach: &[&Path], misuse: &[&Path]) {
    let probe = prefix.path("probe.c");
    std::fs::write(&probe, "int main(void) { return 0; }\n").unwrap();
    let sanitize = ["-fsanitize=address", "-fno-omit-frame-pointer"];
    let works = Command::new("cc").args(sanitize).arg(&probe).arg("-o").arg(prefix.path("probe")).output();
    if !works.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: this compiler has no AddressSanitizer");
        return;
    }
    for (source, arguments) in [("tests/misuse.c", misuse), ("examples/attach.c", attach)] {
        let program = prefix.compile(source, "sanitized", &sanitize);
        ok(&prefix.run(&program, arguments), source);
    }
}

fn valgrind(prefix: &Prefix, programs: [(&PathBuf, &[&Path; 2]); 2]) {
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("skipped: valgrind is not installed");
        return;
    }
    for (program, arguments) in programs {
        let mut command = Command::new("valgrind");
        command.args(["--quiet", "--error-exitcode=9", "--leak-check=full"]);
        command.arg("--errors-for-leak-kinds=definite,indirect");
        command.arg(program).args(arguments).env("LD_LIBRARY_PATH", prefix.path("lib"));
        succeeded(&mut command);
    }
}
