//! Manifests remembered from one run to the next, by the stamps of the files they were made of.
//!
//! A manifest is used again only if every file is still the same inode with the same size and times. The store
//! is a help, not the truth: whatever is wrong with an entry, it is removed and the files are read again.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use super::manifest::{self, Manifest, hex};
use crate::config::Limits;
use crate::source::file::OpenFile;

const EXTENSION: &str = "manifest";
/// Where an entry is written before it has its name.
const UNFINISHED: &str = "tmp";
/// What precedes the manifest in an entry: hash of the rest, key, and the ends of their lines.
const HEAD_BYTES: usize = 64 + 1 + 64 + 1;

/// A directory of remembered manifests. Blocks: to be used on a thread that may.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    entries_max: usize,
    limits: Limits,
    /// Makes the names of unfinished entries unique.
    written: AtomicU64,
}

impl Store {
    /// Opens, or makes, the store in `dir`, which only the daemon's user may enter.
    ///
    /// # Errors
    /// If the directory cannot be made, closed to others, or read.
    pub fn open(dir: &Path, entries_max: usize, limits: &Limits) -> io::Result<Store> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        fs::set_permissions(dir, Permissions::from_mode(0o700))?;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            // Left by a run that ended in the middle of a write.
            if path.extension().is_some_and(|extension| extension == UNFINISHED) {
                fs::remove_file(path)?;
            }
        }
        Ok(Store { dir: dir.to_owned(), entries_max, limits: limits.clone(), written: AtomicU64::new(0) })
    }

    /// The manifest that was put for files of these names and stamps.
    pub fn get(&self, files: &[OpenFile]) -> Option<Manifest> {
        let key = key(files);
        let path = self.path(&key);
        let problem = match self.read(&path, &key, files) {
            Ok(manifest) => return Some(manifest),
            Err(Damaged::Absent) => return None,
            Err(problem) => problem,
        };
        tracing::warn!(path = %path.display(), %problem, "a remembered manifest cannot be used and is removed");
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "it cannot be removed either");
        }
        None
    }

    /// Removes what is remembered of `files`, if anything is.
    pub fn forget(&self, files: &[OpenFile]) {
        match fs::remove_file(self.path(&key(files))) {
            Ok(()) => {
                tracing::warn!("a remembered manifest is removed: what it says differs from what was read")
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, "a remembered manifest cannot be removed"),
        }
    }

    /// Remembers `manifest` for `files` as their stamps say. On return it has reached the disk; the oldest entries
    /// beyond the limit are gone.
    ///
    /// # Errors
    /// If it cannot be written; what was remembered before is still there.
    pub fn put(&self, files: &[OpenFile], manifest: &Manifest) -> io::Result<()> {
        let key = key(files);
        let manifest =
            manifest.to_bytes().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let unfinished = self.dir.join(format!("{}-{number}.{UNFINISHED}", std::process::id()));
        let written = self.write(&unfinished, &key, &manifest).and_then(|()| {
            fs::rename(&unfinished, self.path(&key))?;
            File::open(&self.dir)?.sync_all()
        });
        if written.is_err() {
            // It may not even exist; the error that counts is the first one.
            let _ = fs::remove_file(&unfinished);
        }
        written?;
        self.shrink()
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.{EXTENSION}"))
    }

    fn write(&self, path: &Path, key: &str, manifest: &[u8]) -> io::Result<()> {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
        let mut hash = Sha256::new();
        hash.update(format!("{key}\n"));
        hash.update(manifest);
        file.write_all(format!("{}\n{key}\n", hex(&hash.finalize())).as_bytes())?;
        file.write_all(manifest)?;
        file.sync_data()
    }

    fn read(&self, path: &Path, key: &str, files: &[OpenFile]) -> Result<Manifest, Damaged> {
        let file = File::open(path)?;
        let mut entry = Vec::new();
        file.take(manifest::BYTES_MAX + HEAD_BYTES as u64 + 1).read_to_end(&mut entry)?;
        let (hash, rest) = entry.split_at_checked(64).ok_or(Damaged::Checksum)?;
        let rest = rest.strip_prefix(b"\n").ok_or(Damaged::Checksum)?;
        if hex(&Sha256::digest(rest)).as_bytes() != hash {
            return Err(Damaged::Checksum);
        }
        let manifest = rest.strip_prefix(key.as_bytes()).and_then(|rest| rest.strip_prefix(b"\n"));
        let manifest = Manifest::parse(manifest.ok_or(Damaged::Key)?, &self.limits)?;
        let entries = &manifest.description().files;
        let same = |(entry, file): (&super::FileEntry, &OpenFile)| {
            entry.name == file.name && entry.bytes == file.stamp.bytes
        };
        if entries.len() != files.len() || !entries.iter().zip(files).all(same) {
            return Err(Damaged::Key);
        }
        Ok(manifest)
    }

    /// Removes the oldest entries beyond the limit.
    fn shrink(&self) -> io::Result<()> {
        let mut entries: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                entries.push((entry.metadata()?.modified()?, path));
            }
        }
        entries.sort_unstable();
        let surplus = entries.len().saturating_sub(self.entries_max);
        entries.into_iter().take(surplus).try_for_each(|(_, path)| fs::remove_file(path))
    }
}

/// Why an entry cannot be used.
#[derive(Debug, thiserror::Error)]
enum Damaged {
    #[error("it is not there")]
    Absent,
    #[error("{0}")]
    Io(io::Error),
    #[error("its checksum does not fit")]
    Checksum,
    #[error("it belongs to other files")]
    Key,
    #[error(transparent)]
    Manifest(#[from] manifest::Error),
}

impl From<io::Error> for Damaged {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::NotFound { Damaged::Absent } else { Damaged::Io(error) }
    }
}

/// What entries are named by: the hash of names and stamps.
fn key(files: &[OpenFile]) -> String {
    let mut hash = Sha256::new();
    for file in files {
        let stamp = &file.stamp;
        // Lengths first, so that no two lists are written alike.
        hash.update((file.name.len() as u64).to_le_bytes());
        hash.update(&file.name);
        hash.update(stamp.dev_major.to_le_bytes());
        hash.update(stamp.dev_minor.to_le_bytes());
        hash.update(stamp.inode.to_le_bytes());
        hash.update(stamp.bytes.to_le_bytes());
        for (seconds, nanoseconds) in [stamp.mtime, stamp.ctime] {
            hash.update(seconds.to_le_bytes());
            hash.update(nanoseconds.to_le_bytes());
        }
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::manifest::CHUNK_BYTES;
    use crate::source::file::from_fds;

    fn limits() -> Limits {
        crate::config::Config::default().limits
    }

    /// A store with the sample manifest put for a file that fits it.
    struct Fixture {
        dir: tempfile::TempDir,
        store: Store,
        manifest: Manifest,
    }

    impl Fixture {
        fn new(entries_max: usize) -> Fixture {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(&dir.path().join("state/manifests"), entries_max, &limits()).unwrap();
            Fixture { dir, store, manifest: manifest::tests::sample() }
        }

        fn file(&self, name: &str) -> Vec<OpenFile> {
            let file = File::create_new(self.dir.path().join(name)).unwrap();
            file.set_len(CHUNK_BYTES + 1).unwrap();
            let file = File::open(self.dir.path().join(name)).unwrap();
            from_fds(vec![file.into()], &["a.safetensors".to_owned()], &limits()).unwrap()
        }

        fn entries(&self) -> Vec<PathBuf> {
            fs::read_dir(&self.store.dir).unwrap().map(|entry| entry.unwrap().path()).collect()
        }
    }

    #[test]
    fn what_was_put_is_found_by_a_later_run_until_the_file_changes() {
        let fixture = Fixture::new(8);
        let files = fixture.file("a");
        assert_eq!(fixture.store.get(&files), None);
        fixture.store.put(&files, &fixture.manifest).unwrap();
        let later = Store::open(&fixture.store.dir, 8, &limits()).unwrap();
        assert_eq!(later.get(&files).as_ref(), Some(&fixture.manifest));
        assert_eq!(later.get(&fixture.file("b")), None);
        let changed = |change: fn(&mut OpenFile)| {
            let mut files = files.clone();
            change(&mut files[0]);
            assert_eq!(later.get(&files), None);
        };
        changed(|file| file.name.push('x'));
        changed(|file| file.stamp.inode += 1);
        changed(|file| file.stamp.dev_minor += 1);
        changed(|file| file.stamp.bytes += 1);
        changed(|file| file.stamp.mtime.1 += 1);
        changed(|file| file.stamp.ctime.0 += 1);
        assert!(later.get(&files).is_some());
    }

    #[test]
    fn only_the_owner_may_look() {
        let fixture = Fixture::new(8);
        fixture.store.put(&fixture.file("a"), &fixture.manifest).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&fixture.store.dir), 0o700);
        assert_eq!(fixture.entries().iter().map(|path| mode(path)).collect::<Vec<_>>(), [0o600]);
    }

    #[test]
    fn a_damaged_entry_is_removed() {
        let fixture = Fixture::new(8);
        let files = fixture.file("a");
        let damages: &[fn(&mut Vec<u8>)] = &[
            |entry| entry.clear(),
            |entry| entry.truncate(100),
            |entry| entry.truncate(entry.len() - 1),
            |entry| entry.push(b' '),
            |entry| entry[0] ^= 1,
            |entry| entry[70] ^= 1,
            |entry| entry[HEAD_BYTES] ^= 1,
            |entry| entry.iter_mut().for_each(|byte| *byte = 0),
        ];
        for (number, damage) in damages.iter().enumerate() {
            fixture.store.put(&files, &fixture.manifest).unwrap();
            let path = fixture.entries().remove(0);
            let mut entry = fs::read(&path).unwrap();
            damage(&mut entry);
            fs::write(&path, entry).unwrap();
            assert_eq!(fixture.store.get(&files), None, "{number}");
            assert_eq!(fixture.entries(), Vec::<PathBuf>::new(), "{number}");
        }
        // Whole, but the entry of another file.
        let other = fixture.file("b");
        fixture.store.put(&other, &fixture.manifest).unwrap();
        fs::rename(fixture.entries().remove(0), fixture.store.path(&key(&files))).unwrap();
        assert_eq!(fixture.store.get(&files), None);
    }

    #[test]
    fn the_oldest_go_first() {
        let fixture = Fixture::new(2);
        let files: Vec<Vec<OpenFile>> = ["a", "b", "c"].map(|name| fixture.file(name)).into();
        for (age, files) in [30, 20, 10].into_iter().zip(&files) {
            fixture.store.put(files, &fixture.manifest).unwrap();
            let entry = File::options().write(true).open(fixture.store.path(&key(files))).unwrap();
            entry.set_modified(SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
        }
        fixture.store.put(&fixture.file("d"), &fixture.manifest).unwrap();
        let found: Vec<bool> = files.iter().map(|files| fixture.store.get(files).is_some()).collect();
        assert_eq!(found, [false, false, true]);
        assert_eq!(fixture.entries().len(), 2);
    }

    #[test]
    fn what_a_broken_run_left_is_removed() {
        let fixture = Fixture::new(8);
        fs::write(fixture.store.dir.join("1-0.tmp"), b"half").unwrap();
        Store::open(&fixture.store.dir, 8, &limits()).unwrap();
        assert_eq!(fixture.entries(), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_write_that_fails_leaves_nothing() {
        let fixture = Fixture::new(8);
        let files = fixture.file("a");
        // The place of the entry is taken by a directory with something in it: the rename fails.
        fs::create_dir_all(fixture.store.path(&key(&files)).join("x")).unwrap();
        assert!(fixture.store.put(&files, &fixture.manifest).is_err());
        assert_eq!(fixture.entries().len(), 1);
    }
}
