//! One opened file: its descriptors, and the stamp by which a change is noticed.

use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::index::is_plain;
use crate::config::Limits;
use crate::error::Code;
use crate::json::shown;

/// Why a file cannot be had. `name` is what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not exist.
    #[error("'{}' does not exist", shown(name))]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// The tenant may not read it.
    #[error("'{}' may not be read with the rights of the caller", shown(name))]
    PermissionDenied {
        /// What was asked for.
        name: String,
    },
    /// It is not below a configured root, or a symlink leads out of it.
    #[error("'{}' is outside of the configured roots: {why}", shown(name))]
    OutsideRoot {
        /// What was asked for.
        name: String,
        /// How it leads out.
        why: &'static str,
    },
    /// It is a FIFO, a socket, a device, or a directory where a file is needed.
    #[error("'{}' is not a regular file", shown(name))]
    NotRegular {
        /// What was asked for.
        name: String,
    },
    /// It ended before a read did, although it was longer when it was opened.
    #[error("'{}' ended in the middle of a read: it has become shorter", shown(name))]
    ShortRead {
        /// What was asked for.
        name: String,
    },
    /// The system refused something else.
    #[error("'{}' cannot be {action}: {errno}", shown(name))]
    Io {
        /// What was asked for.
        name: String,
        /// What was tried: `opened`, `read`, ….
        action: &'static str,
        /// What the system said.
        errno: Errno,
    },
    /// The descriptors of a request cannot be used.
    #[error("descriptor {index} cannot be used: {why}")]
    Descriptor {
        /// Its place in the message.
        index: usize,
        /// Why.
        why: &'static str,
    },
    /// The names do not fit the descriptors.
    #[error("the names of the descriptors cannot be used: {why}")]
    Names {
        /// Why.
        why: &'static str,
    },
    /// More files than allowed.
    #[error("the artifact has {files} files, more than the limit of {files_max}")]
    TooManyFiles {
        /// How many.
        files: usize,
        /// The limit.
        files_max: u32,
    },
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::NotFound { .. } => Code::SourceFileNotFound,
            Error::PermissionDenied { .. } => Code::SourceFilePermissionDenied,
            Error::OutsideRoot { .. } => Code::SourceFileOutsideRoot,
            Error::NotRegular { .. } => Code::SourceFileNotRegular,
            Error::ShortRead { .. } => Code::SourceFileShortRead,
            Error::Io { .. } => Code::SourceFileIo,
            Error::Descriptor { .. } | Error::Names { .. } => Code::SourceFdsInvalid,
            Error::TooManyFiles { .. } => Code::CatalogTooManyFiles,
        };
        crate::Error::new(code, error.to_string())
    }
}

impl Error {
    /// The error for what the system said when `name` was to be opened below a root.
    pub(super) fn opening(name: &str, errno: Errno) -> Error {
        let name = name.to_owned();
        match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG => Error::NotFound { name },
            Errno::ACCESS | Errno::PERM => Error::PermissionDenied { name },
            Errno::XDEV => Error::OutsideRoot { name, why: "a symlink leads out of the root" },
            Errno::LOOP => Error::OutsideRoot { name, why: "a symlink leads in a circle or into /proc" },
            errno => Error::Io { name, action: "opened", errno },
        }
    }
}

/// What identifies the content of a file as far as the file system knows: if it is the same before and after
/// a load, the file did not change in between.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    /// Major number of the device.
    pub dev_major: u32,
    /// Minor number of the device.
    pub dev_minor: u32,
    /// Inode number.
    pub inode: u64,
    /// Length, bytes.
    pub bytes: u64,
    /// Last change of the content: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Last change of the inode, which no program can set back: seconds and nanoseconds.
    pub ctime: (i64, u32),
}

/// A file of an artifact, open for reading. Always a regular file when it was opened.
#[derive(Debug, Clone)]
pub struct OpenFile {
    /// Name relative to the artifact: one plain component.
    pub name: String,
    /// For reading through the page cache.
    pub file: Arc<OwnedFd>,
    /// The same file for reading past the page cache; `None` where the file system refuses it.
    pub direct: Option<Arc<OwnedFd>>,
    /// As it was when opened.
    pub stamp: Stamp,
    /// The tensors that an index says are in this file, sorted; `None` without an index.
    pub indexed: Option<Arc<[String]>>,
}

impl OpenFile {
    /// Opens, by its O_PATH descriptor, the file that the tenant named `requested`. The calling thread has the
    /// rights that shall count.
    pub(super) fn open(path: &OwnedFd, name: &str, requested: &str) -> Result<OpenFile, Error> {
        let opening = |errno| Error::opening(requested, errno);
        if file_type(path).map_err(opening)? != FileType::RegularFile {
            return Err(Error::NotRegular { name: requested.to_owned() });
        }
        let file = reopen(path, OFlags::empty()).map_err(opening)?;
        Self::complete(file, name).map_err(opening)
    }

    /// The descriptor `file`, of a regular file and its own description, with its companion and stamp.
    fn complete(file: OwnedFd, name: &str) -> Result<OpenFile, Errno> {
        let direct = match reopen(&file, OFlags::DIRECT) {
            Ok(direct) => Some(Arc::new(direct)),
            Err(Errno::INVAL) => None,
            Err(errno) => return Err(errno),
        };
        let stamp = stamp(&file)?;
        Ok(OpenFile { name: name.to_owned(), file: Arc::new(file), direct, stamp, indexed: None })
    }

    /// The stamp as it is now.
    ///
    /// # Errors
    /// [`Error::Io`] if the system cannot tell.
    pub fn restamp(&self) -> Result<Stamp, Error> {
        stamp(&self.file).map_err(|errno| Error::Io { name: self.name.clone(), action: "examined", errno })
    }

    /// Fills `buffer` from `offset` on, through the page cache.
    ///
    /// # Errors
    /// [`Error::ShortRead`] if the file ends before; [`Error::Io`] if it cannot be read.
    pub fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> Result<(), Error> {
        while !buffer.is_empty() {
            match rustix::io::pread(&self.file, &mut *buffer, offset) {
                Ok(0) => return Err(Error::ShortRead { name: self.name.clone() }),
                Ok(read) => {
                    buffer = &mut buffer[read..];
                    offset += read as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::Io { name: self.name.clone(), action: "read", errno }),
            }
        }
        Ok(())
    }
}

/// The files behind descriptors that a client sent, named `names` or else `0.safetensors`, `1.safetensors`, ….
///
/// The status flags of a client's descriptor are never changed, for the client shares them: each file is opened
/// again where that is possible, and a descriptor is used as it came where it is not.
///
/// # Errors
/// `source.fds_invalid` if there is none, or one is not a regular file open for reading, or the names do not fit;
/// `catalog.too_many_files`.
pub fn from_fds(fds: Vec<OwnedFd>, names: &[String], limits: &Limits) -> Result<Vec<OpenFile>, Error> {
    if fds.is_empty() {
        return Err(Error::Names { why: "no descriptor came with the request" });
    }
    if fds.len() > limits.files_max as usize {
        return Err(Error::TooManyFiles { files: fds.len(), files_max: limits.files_max });
    }
    if !names.is_empty() && names.len() != fds.len() {
        return Err(Error::Names { why: "there must be one for each descriptor, or none" });
    }
    if !names.iter().all(|name| is_plain(name)) {
        return Err(Error::Names { why: "each must be a plain file name" });
    }
    let mut sorted: Vec<&String> = names.iter().collect();
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Error::Names { why: "two are the same" });
    }
    fds.into_iter()
        .enumerate()
        .map(|(index, fd)| {
            let name = names.get(index).cloned().unwrap_or_else(|| format!("{index}.safetensors"));
            from_fd(fd, &name).map_err(|why| Error::Descriptor { index, why })
        })
        .collect()
}

/// File systems whose files a client may not send: a FUSE server that does not answer would hold threads of the daemon and
/// can forge what a file is; what the others show depends on who opens it. Magic numbers of `linux/magic.h`.
const REFUSED_FILE_SYSTEMS: &[(u64, &str)] = &[
    (0x6573_5546, "it is on a FUSE file system"),
    (0x9fa0, "it is in procfs"),
    (0x6265_6572, "it is in sysfs"),
    (0x6462_6720, "it is in debugfs"),
    (0x7472_6163, "it is in tracefs"),
    (0x6367_7270, "it is in cgroupfs"),
    (0x0027_e0eb, "it is in cgroupfs"),
    (0x7363_6673, "it is in securityfs"),
    (0xcafe_4a11, "it is in bpffs"),
];

fn refused_file_system(magic: u64) -> Option<&'static str> {
    REFUSED_FILE_SYSTEMS.iter().find(|(refused, _)| *refused == magic).map(|(_, why)| *why)
}

fn from_fd(fd: OwnedFd, name: &str) -> Result<OpenFile, &'static str> {
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|_| "the system does not say how it was opened")?;
    if flags.contains(OFlags::PATH) || (flags & OFlags::ACCMODE) == OFlags::WRONLY {
        return Err("it is not open for reading");
    }
    if file_type(&fd).map_err(|_| "the system does not say what it is")? != FileType::RegularFile {
        return Err("it is not a regular file");
    }
    let system = rustix::fs::fstatfs(&fd).map_err(|_| "the system does not say where it is")?;
    if let Some(why) = refused_file_system(system.f_type as u64 & 0xffff_ffff) {
        return Err(why);
    }
    // The client has shown that it may read the file; whether the daemon may is a second question.
    match reopen(&fd, OFlags::empty()) {
        Ok(own) => {
            OpenFile::complete(own, name).map_err(|_| "it cannot be opened for reading past the page cache")
        }
        Err(_) if flags.contains(OFlags::DIRECT) => {
            Err("it is open with O_DIRECT and cannot be opened without")
        }
        Err(_) => {
            let stamp = stamp(&fd).map_err(|_| "the system does not say what it is")?;
            Ok(OpenFile { name: name.to_owned(), file: Arc::new(fd), direct: None, stamp, indexed: None })
        }
    }
}

/// Opens the file behind a descriptor once more, for reading, with a description of its own.
fn reopen(fd: &OwnedFd, extra: OFlags) -> Result<OwnedFd, Errno> {
    // O_NONBLOCK so that a lease (fcntl(2), F_SETLEASE) that somebody holds on the file cannot stall this thread.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK | extra;
    let own = rustix::fs::open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty())?;
    // It must not stay: io_uring would answer EAGAIN instead of reading.
    let flags = rustix::fs::fcntl_getfl(&own)?;
    rustix::fs::fcntl_setfl(&own, flags - OFlags::NONBLOCK)?;
    Ok(own)
}

/// What kind of file a descriptor (also one of O_PATH) stands for.
pub(super) fn file_type(fd: impl AsFd) -> Result<FileType, Errno> {
    let stat = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(u32::from(stat.stx_mode)))
}

fn stamp(fd: impl AsFd) -> Result<Stamp, Errno> {
    let stat = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    Ok(Stamp {
        dev_major: stat.stx_dev_major,
        dev_minor: stat.stx_dev_minor,
        inode: stat.stx_ino,
        bytes: stat.stx_size,
        mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
        ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt as _;

    fn limits() -> Limits {
        crate::config::Config::default().limits
    }

    fn code(result: Result<Vec<OpenFile>, Error>) -> Code {
        crate::Error::from(result.unwrap_err()).code
    }

    fn fd(path: &std::path::Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    #[test]
    fn descriptors_become_files_with_a_description_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"hello").unwrap();
        let sent: OwnedFd =
            File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap().into();
        let watch = sent.try_clone().unwrap();
        let before = rustix::fs::fcntl_getfl(&watch).unwrap();
        let files = from_fds(vec![sent, fd(&path)], &[], &limits()).unwrap();
        assert_eq!(files[0].name, "0.safetensors");
        assert_eq!(files[1].name, "1.safetensors");
        assert_eq!(files[0].stamp.bytes, 5);
        assert_eq!(files[0].stamp, files[0].restamp().unwrap());
        assert_eq!(rustix::fs::fcntl_getfl(&watch).unwrap(), before, "the client's flags are untouched");
        for own in std::iter::once(&files[0].file).chain(&files[0].direct) {
            assert!(!rustix::fs::fcntl_getfl(own).unwrap().contains(OFlags::NONBLOCK));
        }
        let mut text = [0; 4];
        files[0].read_exact_at(&mut text, 1).unwrap();
        assert_eq!(&text, b"ello");
        assert!(matches!(files[0].read_exact_at(&mut text, 2), Err(Error::ShortRead { .. })));
    }

    #[test]
    fn direct_descriptors_are_read_through_the_page_cache_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"hello").unwrap();
        let Ok(sent) = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path) else { return };
        let files = from_fds(vec![sent.into()], &["x.gguf".to_owned()], &limits()).unwrap();
        assert!(files[0].direct.is_some());
        let mut text = [0; 5];
        files[0].read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"hello");
    }

    #[test]
    fn unlinked_files_and_memory_files_can_be_read() {
        let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&memory, b"abc").unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), b"abc").unwrap();
        let gone = fd(&dir.path().join("a"));
        std::fs::remove_file(dir.path().join("a")).unwrap();
        for file in from_fds(vec![memory, gone], &[], &limits()).unwrap() {
            let mut text = [0; 3];
            file.read_exact_at(&mut text, 0).unwrap();
            assert_eq!(&text, b"abc");
        }
    }

    #[test]
    fn what_is_not_a_readable_regular_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"x").unwrap();
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        let write_only = File::options().write(true).open(&path).unwrap().into();
        let by_path = rustix::fs::open(&path, OFlags::PATH, Mode::empty()).unwrap();
        for bad in [pipe, fd(dir.path()), fd("/dev/null".as_ref()), write_only, by_path] {
            let error = from_fds(vec![fd(&path), bad], &[], &limits()).unwrap_err();
            assert!(matches!(error, Error::Descriptor { index: 1, .. }), "{error}");
        }
    }

    #[test]
    fn names_must_fit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"x").unwrap();
        let two = || vec![fd(&path), fd(&path)];
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(from_fds(two(), &names(&["a", "b"]), &limits()).unwrap()[1].name, "b");
        for bad in [&["a"] as &[&str], &["a", "a"], &["a", ""], &["a", "../b"], &["a", "b\0"]] {
            assert_eq!(code(from_fds(two(), &names(bad), &limits())), Code::SourceFdsInvalid, "{bad:?}");
        }
        assert_eq!(code(from_fds(vec![], &[], &limits())), Code::SourceFdsInvalid);
        let few = Limits { files_max: 1, ..limits() };
        assert_eq!(code(from_fds(two(), &[], &few)), Code::CatalogTooManyFiles);
    }

    #[test]
    fn a_change_changes_the_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"xy").unwrap();
        let file = from_fds(vec![fd(&path)], &[], &limits()).unwrap().remove(0);
        File::options().write(true).open(&path).unwrap().set_len(1).unwrap();
        assert_ne!(file.restamp().unwrap(), file.stamp);
    }
}
