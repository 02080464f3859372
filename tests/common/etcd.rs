//! A real etcd, on free ports and with a directory of its own: started, killed, stopped, emptied.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part of the harness")]
#![allow(clippy::print_stderr, reason = "what a skipped test has to say")]

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::event::poll;
use rustix::fs::Timespec;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// Longest wait for anything; only a failed test waits as long.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// How often a condition is looked at.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
/// For one request of the harness: hashing a password takes long on a busy machine.
const REQUEST: Duration = Duration::from_secs(30);

/// Looks until `condition` holds.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT_MAX;
    while !condition() {
        assert!(Instant::now() < deadline, "no {what} within {WAIT_MAX:?}");
        poll(&mut [], Some(&LOOK)).unwrap();
    }
}

/// Certificates of one authority, as files.
pub struct Authority {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Authority {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Authority { directory, issuer: Issuer::new(params, key) }
    }

    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// A certificate for 127.0.0.1 and its key.
    pub fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let paths = ["pem", "key"].map(|end| self.directory.path().join(format!("{name}.{end}")));
        fs::write(&paths[0], certificate.pem()).unwrap();
        fs::write(&paths[1], key.serialize_pem()).unwrap();
        paths.into()
    }
}

/// A running etcd; killed when it goes out of scope.
pub struct Etcd {
    directory: TempDir,
    ports: [u16; 2],
    flags: Vec<String>,
    authority: Option<Authority>,
    child: Option<Child>,
    runtime: Runtime,
}

impl Etcd {
    /// Starts one; `None`, and a word about it, where etcd is not installed.
    pub fn start(flags: &[&str]) -> Option<Etcd> {
        Etcd::start_with(flags, None)
    }

    /// The same with TLS, and clients that must show a certificate.
    pub fn start_with_tls() -> Option<Etcd> {
        Etcd::start_with(&["--client-cert-auth"], Some(Authority::new()))
    }

    fn start_with(flags: &[&str], authority: Option<Authority>) -> Option<Etcd> {
        if Command::new("etcd").arg("--version").stdout(Stdio::null()).status().is_err() {
            eprintln!("skipped: etcd is not installed (scripts/setup installs etcd-server)");
            return None;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        if let Some(authority) = &authority {
            let (certificate, key) = authority.issue("etcd");
            for (flag, path) in [("cert", certificate), ("key", key), ("trusted-ca", authority.ca())] {
                flags.push(format!("--{flag}-file={}", path.display()));
            }
        }
        let mut etcd = Etcd {
            directory: tempfile::tempdir().unwrap(),
            ports: free_ports(),
            flags,
            authority,
            child: None,
            runtime,
        };
        etcd.restart();
        Some(etcd)
    }

    /// Starts it again on the same ports and the same data.
    pub fn restart(&mut self) {
        self.kill();
        let [client, peer] = self.ports.map(|port| format!("127.0.0.1:{port}"));
        let scheme = if self.authority.is_some() { "https" } else { "http" };
        let log = File::options().append(true).create(true).open(self.directory.path().join("log")).unwrap();
        let child = Command::new("etcd")
            .arg(format!("--data-dir={}", self.data().display()))
            .arg(format!("--listen-client-urls={scheme}://{client}"))
            .arg(format!("--advertise-client-urls={scheme}://{client}"))
            .arg(format!("--listen-peer-urls=http://{peer}"))
            .arg(format!("--initial-advertise-peer-urls=http://{peer}"))
            .arg(format!("--initial-cluster=default=http://{peer}"))
            // Of one member: it need not wait for others, and a lease may be short.
            .args(["--heartbeat-interval=20", "--election-timeout=200"])
            .args(&self.flags)
            .env_clear()
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let deadline = Instant::now() + WAIT_MAX;
        while self.try_request(async |mut client| client.status().await).is_none() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "etcd does not start:\n{}", self.log());
            poll(&mut [], Some(&LOOK)).unwrap();
        }
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Its data is gone; it must have been killed.
    pub fn erase(&self) {
        assert!(self.child.is_none());
        fs::remove_dir_all(self.data()).unwrap();
    }

    /// SIGSTOP: it holds its connections and answers nothing.
    pub fn stop(&self) {
        kill_process(self.pid(), Signal::STOP).unwrap();
    }

    pub fn go_on(&self) {
        kill_process(self.pid(), Signal::CONT).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().unwrap())
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// A place for files of the test.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn authority(&self) -> &Authority {
        self.authority.as_ref().unwrap()
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0])
    }

    pub fn endpoint(&self) -> String {
        let scheme = if self.authority.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address())
    }

    /// A request by a client of the harness's own, without a user.
    pub fn request<T>(&self, what: impl AsyncFnOnce(Client) -> Result<T, etcd_client::Error>) -> T {
        self.try_request(what).unwrap_or_else(|| panic!("etcd does not answer:\n{}", self.log()))
    }

    pub fn try_request<T>(
        &self,
        what: impl AsyncFnOnce(Client) -> Result<T, etcd_client::Error>,
    ) -> Option<T> {
        let mut options = ConnectOptions::new();
        if let Some(authority) = &self.authority {
            let read = |path: PathBuf| fs::read(path).unwrap();
            let (certificate, key) = authority.issue("harness");
            let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(authority.ca())));
            options = options.with_tls(tls.identity(Identity::from_pem(read(certificate), read(key))));
        }
        let request = async {
            let client = Client::connect([self.endpoint()], Some(options)).await?;
            what(client).await
        };
        self.runtime.block_on(async { timeout(REQUEST, request).await }).ok()?.ok()
    }

    pub fn put(&self, key: &str, value: impl Into<Vec<u8>>) {
        self.request(async |mut client| client.put(key, value, None).await);
    }

    /// What stands under this key: the value and the lease.
    pub fn get(&self, key: &str) -> Option<(Vec<u8>, i64)> {
        let answer = self.request(async |mut client| client.get(key, None).await);
        answer.kvs().first().map(|pair| (pair.value().to_vec(), pair.lease()))
    }

    pub fn delete(&self, key: &str) {
        self.request(async |mut client| client.delete(key, None).await);
    }

    /// Forgets all of its history but the present.
    pub fn compact(&self) {
        self.request(async |mut client| {
            let revision = client.get("/", None).await?.header().unwrap().revision();
            client.compact(revision, None).await
        });
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Ports that are free now, and are given to nobody else by the kernel for a while.
fn free_ports() -> [u16; 2] {
    let listeners = [(), ()].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}
