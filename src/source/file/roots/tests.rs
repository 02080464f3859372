use super::*;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};

/// A directory for one test, with the root `root` in it, readable by anybody.
struct Fixture {
    dir: tempfile::TempDir,
    roots: Roots,
}

impl Fixture {
    fn new() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let roots = Roots::open(&[dir.path().join("root")]).unwrap();
        Fixture { dir, roots }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("root").join(name)
    }

    fn write(&self, name: &str, content: &[u8]) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), content).unwrap();
    }

    fn open_as(&self, name: &str, tenant: &Tenant, limits: &Limits) -> Result<Vec<OpenFile>> {
        self.roots.open_artifact(self.path(name).to_str().unwrap(), tenant, limits)
    }

    fn open(&self, name: &str) -> Result<Vec<OpenFile>> {
        self.open_as(name, &own(), &limits())
    }

    fn names(&self, name: &str) -> Vec<String> {
        self.open(name).unwrap().into_iter().map(|file| file.name).collect()
    }

    fn code(&self, name: &str) -> Code {
        self.open(name).unwrap_err().code
    }
}

fn own() -> Tenant {
    Tenant { uid: rustix::process::geteuid().as_raw(), gid: 0, groups: vec![] }
}

fn limits() -> Limits {
    crate::config::Config::default().limits
}

fn content(file: &OpenFile) -> Vec<u8> {
    let mut bytes = vec![0; file.stamp.bytes as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_file_is_an_artifact() {
    let fixture = Fixture::new();
    fixture.write("m/a.safetensors", b"hello");
    let files = fixture.open("m/a.safetensors").unwrap();
    assert_eq!((files.len(), files[0].name.as_str()), (1, "a.safetensors"));
    assert_eq!(content(&files[0]), b"hello");
    assert_eq!(files[0].stamp, files[0].restamp().unwrap());
    let uri = format!("file://{}", fixture.path("m/a%2Esafetensors").display());
    assert_eq!(fixture.roots.open_artifact(&uri, &own(), &limits()).unwrap()[0].name, "a.safetensors");
}

#[test]
fn the_content_of_a_directory_decides_its_files() {
    let fixture = Fixture::new();
    for name in ["all/config.json", "all/vocab.txt", "all/.hidden", "all/sub/x", "gguf/b.gguf", "gguf/a.gguf"]
    {
        fixture.write(name, b"");
    }
    for name in ["gguf/c.txt", "st/b.safetensors", "st/a.safetensors", "st/a.gguf", "st/.x.safetensors"] {
        fixture.write(name, b"");
    }
    assert_eq!(fixture.names("all"), ["config.json", "vocab.txt"]);
    assert_eq!(fixture.names("gguf"), ["a.gguf", "b.gguf"]);
    assert_eq!(fixture.names("st"), ["a.safetensors", "b.safetensors"]);
    fixture.write("empty/sub/x", b"");
    assert_eq!(fixture.code("empty"), Code::CatalogEmpty);
    let few = Limits { files_max: 1, ..limits() };
    for name in ["all", "gguf", "st"] {
        assert_eq!(
            fixture.open_as(name, &own(), &few).unwrap_err().code,
            Code::CatalogTooManyFiles,
            "{name}"
        );
    }
}

#[test]
fn the_root_itself_can_be_named() {
    let fixture = Fixture::new();
    fixture.write("a.gguf", b"");
    assert_eq!(fixture.names(""), ["a.gguf"]);
}

#[test]
fn an_index_names_the_shards() {
    let fixture = Fixture::new();
    for name in ["1.safetensors", "2.safetensors", "stray.safetensors"] {
        fixture.write(&format!("m/{name}"), name.as_bytes());
    }
    let index =
        br#"{"metadata":{},"weight_map":{"b":"2.safetensors","c":"1.safetensors","a":"2.safetensors"}}"#;
    fixture.write("m/model.safetensors.index.json", index);
    // With the usual name, others do not matter.
    fixture.write("m/model.fp16.safetensors.index.json", b"not read");
    let files = fixture.open("m").unwrap();
    assert_eq!(
        files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>(),
        ["1.safetensors", "2.safetensors"]
    );
    let indexed: Vec<Vec<String>> = files.iter().map(|file| file.indexed.clone().unwrap().to_vec()).collect();
    assert_eq!(indexed, [vec!["c"], vec!["a", "b"]]);

    fs::rename(fixture.path("m/model.safetensors.index.json"), fixture.path("m/x.safetensors.index.json"))
        .unwrap();
    assert_eq!(fixture.code("m"), Code::CatalogIndexAmbiguous);
    fs::remove_file(fixture.path("m/model.fp16.safetensors.index.json")).unwrap();
    assert_eq!(fixture.names("m"), ["1.safetensors", "2.safetensors"]);

    fs::remove_file(fixture.path("m/2.safetensors")).unwrap();
    let error = fixture.open("m").unwrap_err();
    assert_eq!(error.code, Code::SourceFileNotFound);
    assert!(error.message.contains("m/2.safetensors"), "{error}");
}

#[test]
fn a_bad_index_is_refused() {
    let fixture = Fixture::new();
    fixture.write("secret/a.safetensors", b"");
    fixture.write("m/model.safetensors.index.json", br#"{"weight_map":{"a":"../secret/a.safetensors"}}"#);
    assert_eq!(fixture.code("m"), Code::CatalogIndexBadName);
    fixture.write("m/model.safetensors.index.json", b"{}");
    assert_eq!(fixture.code("m"), Code::CatalogIndexBadWeightMap);
    let short = Limits { header_bytes_max: 1, ..limits() };
    assert_eq!(fixture.open_as("m", &own(), &short).unwrap_err().code, Code::CatalogIndexTooLarge);
    fixture.write("n/1", b"");
    fixture.write("n/2", b"");
    fixture.write("n/model.safetensors.index.json", br#"{"weight_map":{"a":"1","b":"2"}}"#);
    let few = Limits { files_max: 1, ..limits() };
    assert_eq!(fixture.open_as("n", &own(), &few).unwrap_err().code, Code::CatalogTooManyFiles);
}

#[test]
fn nothing_outside_of_the_roots_is_reached() {
    let fixture = Fixture::new();
    fs::write(fixture.dir.path().join("secret"), b"secret").unwrap();
    fs::create_dir(fixture.dir.path().join("root2")).unwrap();
    fs::write(fixture.dir.path().join("root2/a"), b"secret").unwrap();
    fixture.write("m/a", b"");
    let secret = fixture.dir.path().join("secret");
    symlink(&secret, fixture.path("absolute")).unwrap();
    symlink("../secret", fixture.path("relative")).unwrap();
    symlink("..", fixture.path("up")).unwrap();
    symlink("../../secret", fixture.path("m/model.safetensors")).unwrap();
    // Also an absolute link to a place below the root: it would mean another file in another mount namespace.
    symlink(fixture.path("m/a"), fixture.path("inside")).unwrap();
    symlink("/proc/self/root", fixture.path("magic")).unwrap();
    symlink("circle", fixture.path("circle")).unwrap();
    for name in
        ["absolute", "relative", "up", "up/secret", "m/../../secret", "m", "inside", "magic", "circle"]
    {
        assert_eq!(fixture.code(name), Code::SourceFileOutsideRoot, "{name}");
    }
    for path in [secret, fixture.dir.path().join("root2/a"), "/".into(), "/etc/passwd".into()] {
        let error = fixture.roots.open_artifact(path.to_str().unwrap(), &own(), &limits()).unwrap_err();
        assert_eq!(error.code, Code::SourceFileOutsideRoot, "{}", path.display());
    }
    let none = Roots::open(&[]).unwrap();
    assert_eq!(
        none.open_artifact("/etc/passwd", &own(), &limits()).unwrap_err().code,
        Code::SourceFileOutsideRoot
    );
}

#[test]
fn links_that_stay_below_the_root_are_followed() {
    let fixture = Fixture::new();
    fixture.write("blobs/0123", b"hello");
    fs::create_dir_all(fixture.path("snapshots/1")).unwrap();
    symlink("../../blobs/0123", fixture.path("snapshots/1/model.safetensors")).unwrap();
    symlink("snapshots/1", fixture.path("latest")).unwrap();
    for name in ["snapshots/1", "snapshots/1/model.safetensors", "latest", "latest/model.safetensors"] {
        let files = fixture.open(name).unwrap();
        assert_eq!(files[0].name, "model.safetensors", "{name}");
        assert_eq!(content(&files[0]), b"hello", "{name}");
    }
    symlink("gone", fixture.path("dangling")).unwrap();
    assert_eq!(fixture.code("dangling"), Code::SourceFileNotFound);
}

#[test]
fn a_root_reached_by_a_link_is_known_by_both_names() {
    let fixture = Fixture::new();
    fixture.write("m/a", b"");
    let link = fixture.dir.path().join("link");
    symlink("root", &link).unwrap();
    let roots = Roots::open(std::slice::from_ref(&link)).unwrap();
    for path in [link.join("m/a"), fixture.dir.path().canonicalize().unwrap().join("root/m/a")] {
        assert!(roots.open_artifact(path.to_str().unwrap(), &own(), &limits()).is_ok(), "{}", path.display());
    }
}

#[test]
fn the_longest_root_counts() {
    let fixture = Fixture::new();
    fixture.write("inner/a", b"");
    fixture.write("secret", b"");
    symlink("../secret", fixture.path("inner/up")).unwrap();
    let roots = Roots::open(&[fixture.path(""), fixture.path("inner")]).unwrap();
    let open = |name: &str| roots.open_artifact(fixture.path(name).to_str().unwrap(), &own(), &limits());
    assert!(open("inner/a").is_ok());
    assert!(open("secret").is_ok());
    assert_eq!(open("inner/up").unwrap_err().code, Code::SourceFileOutsideRoot);
}

#[test]
fn what_is_not_a_file_is_refused_without_waiting() {
    let fixture = Fixture::new();
    let fifo = |name: &str| {
        rustix::fs::mknodat(rustix::fs::CWD, fixture.path(name), FileType::Fifo, Mode::RUSR, 0).unwrap();
    };
    fixture.write("m/x", b"");
    fifo("fifo");
    fifo("m/a.safetensors");
    let _socket = std::os::unix::net::UnixListener::bind(fixture.path("socket")).unwrap();
    for name in ["fifo", "m", "socket"] {
        assert_eq!(fixture.code(name), Code::SourceFileNotRegular, "{name}");
    }
    // Among plain files such a thing is no part of the artifact.
    fs::rename(fixture.path("m/a.safetensors"), fixture.path("m/fifo")).unwrap();
    assert_eq!(fixture.names("m"), ["x"]);
    assert_eq!(fixture.code("absent"), Code::SourceFileNotFound);
    assert_eq!(fixture.code("m/x/y"), Code::SourceFileNotFound);
    assert_eq!(fixture.code(&"n/".repeat(3000)), Code::SourceFileNotFound);
}

#[test]
fn the_tenants_own_rights_decide() {
    let fixture = Fixture::new();
    fixture.write("m/a.safetensors", b"hello");
    fixture.write("m/open.gguf", b"hello");
    fixture.write("closed/a.safetensors", b"hello");
    let mode =
        |name: &str, mode| fs::set_permissions(fixture.path(name), Permissions::from_mode(mode)).unwrap();
    mode("m/a.safetensors", 0o600);
    mode("closed", 0o700);
    let nobody = Tenant { uid: 65534, gid: 65534, groups: vec![] };
    let open = |name: &str| fixture.open_as(name, &nobody, &limits());
    if !identity::can_act_as() {
        assert_eq!(open("m/open.gguf").unwrap_err().code, Code::IdentityCannotActAs);
        return;
    }
    assert!(open("m/open.gguf").is_ok());
    for name in ["m/a.safetensors", "m", "closed", "closed/a.safetensors", "closed/absent"] {
        assert_eq!(open(name).unwrap_err().code, Code::SourceFilePermissionDenied, "{name}");
    }
    assert!(fixture.open("m").is_ok());
    mode("closed", 0o711);
    assert!(open("closed/a.safetensors").is_ok(), "a directory that cannot be listed can be passed through");
    assert_eq!(open("closed").unwrap_err().code, Code::SourceFilePermissionDenied);
}

#[test]
fn roots_must_be_directories() {
    let fixture = Fixture::new();
    fixture.write("file", b"");
    for path in [fixture.path("file"), fixture.path("absent"), "relative".into()] {
        assert_eq!(Roots::open(&[path]).unwrap_err().code, Code::ConfigInvalid);
    }
}

#[test]
fn a_replaced_root_is_not_followed() {
    let fixture = Fixture::new();
    fixture.write("a.gguf", b"old");
    fs::rename(fixture.path(""), fixture.dir.path().join("moved")).unwrap();
    fixture.write("a.gguf", b"new");
    assert_eq!(content(&fixture.open("a.gguf").unwrap()[0]), b"old");
}
