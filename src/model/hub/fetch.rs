//! One file of a repository into the cache: locked, resumed, verified, then linked.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ureq::Body;
use ureq::http::Response;

use super::checksum::{Checksum, Hasher};
use super::client::{Client, Failure, text};
use crate::{Error, Result, files, interrupt};

/// Attempts in a row that bring no byte before the download gives up.
const ATTEMPTS: u32 = 5;
/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// How long another program's download may stand still before we no longer wait for it.
const PATIENCE: Duration = Duration::from_secs(120);

/// A file that is wanted, as the hub describes it.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// Its name in the repository.
    pub name: String,
    /// Its address.
    pub url: String,
    /// Its size in bytes.
    pub size: u64,
    /// What it must be.
    pub checksum: Checksum,
}

/// Where the files of one repository are kept, as huggingface_hub keeps them.
#[derive(Clone, Debug)]
pub(super) struct Places {
    /// `models--owner--name`.
    pub repo: PathBuf,
    /// `.locks/models--owner--name`.
    pub locks: PathBuf,
    /// `models--owner--name/snapshots/COMMIT`.
    pub snapshot: PathBuf,
}

impl Places {
    fn blob(&self, checksum: &Checksum) -> PathBuf {
        self.repo.join("blobs").join(checksum.hex())
    }

    /// Whether the file is there: under its name, and of its size.
    pub fn has(&self, wanted: &Wanted) -> bool {
        fs::metadata(self.snapshot.join(&wanted.name)).is_ok_and(|m| m.is_file() && m.len() == wanted.size)
    }

    /// Bytes of the file that are still to be downloaded.
    pub fn missing(&self, wanted: &Wanted) -> u64 {
        let blob = self.blob(&wanted.checksum);
        if self.has(wanted) || blob.exists() {
            return 0;
        }
        let part = fs::metadata(blob.with_extension("incomplete")).map_or(0, |m| m.len());
        wanted.size.saturating_sub(part)
    }
}

/// Puts the file into the cache, unless it is there, and gives its path in the snapshot.
///
/// What an interrupted download left is gone on with. `progress` is told of every piece.
pub(super) fn fetch(
    client: &Client,
    places: &Places,
    wanted: &Wanted,
    progress: &mut dyn FnMut(u64),
) -> Result<PathBuf> {
    let path = places.snapshot.join(&wanted.name);
    if places.has(wanted) {
        progress(wanted.size);
        return Ok(path);
    }
    let blob = places.blob(&wanted.checksum);
    files::create_dir_all(places.repo.join("blobs"))?;
    files::create_dir_all(&places.locks)?;
    let lock = lock(&places.locks.join(format!("{}.lock", wanted.checksum.hex())), &blob, &wanted.name)?;
    if fs::metadata(&blob).is_ok_and(|m| m.len() == wanted.size) {
        progress(wanted.size);
    } else {
        download(client, wanted, &blob, progress)?;
    }
    drop(lock);
    link(&blob, &path)?;
    Ok(path)
}

/// Released when it is closed.
fn lock(path: &Path, blob: &Path, name: &str) -> Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let file = file.map_err(|e| Error::io("open the lock", path, e))?;
    let size = || fs::metadata(blob.with_extension("incomplete")).map_or(0, |m| m.len());
    let (mut seen, mut moved) = (size(), Instant::now());
    loop {
        // SAFETY: the descriptor belongs to `file`, which is open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(file);
        }
        let e = std::io::Error::last_os_error();
        if e.kind() != std::io::ErrorKind::WouldBlock {
            return Err(Error::io("lock", path, e));
        }
        if size() != seen {
            (seen, moved) = (size(), Instant::now());
        }
        if moved.elapsed() > PATIENCE {
            return Err(Error::new("another program is downloading this file, and makes no progress")
                .at_path(path)
                .found(format!("{name}: {seen} bytes since {} s", PATIENCE.as_secs()))
                .next("end that program, then try again"));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A download that is under way: the file so far, its hash, its length.
struct Partial {
    file: File,
    path: PathBuf,
    hasher: Hasher,
    len: u64,
}

impl Partial {
    /// Opens what an earlier download left, or a new file.
    fn open(path: PathBuf, wanted: &Wanted) -> Result<Self> {
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path);
        let file = file.map_err(|e| Error::io("write", &path, e))?;
        let mut partial = Partial { file, path, hasher: wanted.checksum.hasher(wanted.size), len: 0 };
        let mut buffer = vec![0; CHUNK];
        loop {
            match partial.file.read(&mut buffer).map_err(|e| Error::io("read", &partial.path, e))? {
                0 => break,
                n => {
                    partial.hasher.update(&buffer[..n]);
                    partial.len += n as u64;
                }
            }
        }
        if partial.len > wanted.size {
            partial.restart(wanted)?;
        }
        Ok(partial)
    }

    /// Empties the file.
    fn restart(&mut self, wanted: &Wanted) -> Result<()> {
        use std::io::Seek;
        (self.hasher, self.len) = (wanted.checksum.hasher(wanted.size), 0);
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(|e| Error::io("write", &self.path, e))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io("write", &self.path, e))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }
}

fn download(client: &Client, wanted: &Wanted, blob: &Path, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let part = blob.with_extension("incomplete");
    let mut partial = Partial::open(part.clone(), wanted)?;
    let resumed = partial.len > 0;
    progress(partial.len);
    transfer(client, wanted, &mut partial, progress)?;
    let mut found = partial.hasher.clone().finish();
    if found != wanted.checksum.hex() && resumed {
        // What was there may have been the wrong part.
        partial.restart(wanted)?;
        transfer(client, wanted, &mut partial, progress)?;
        found = partial.hasher.clone().finish();
    }
    if found != wanted.checksum.hex() {
        _ = fs::remove_file(&part);
        return Err(Error::new("a downloaded file is not what the hub says it is")
            .at(wanted.url.clone())
            .expected(format!("{} bytes with the hash {}", wanted.size, wanted.checksum.hex()))
            .found(format!("{} bytes with the hash {found}", partial.len))
            .next("it was not kept: try again; if it repeats, something between here and the hub changes files"));
    }
    partial.file.sync_all().map_err(|e| Error::io("write", &part, e))?;
    fs::rename(&part, blob).map_err(|e| Error::io("rename into place", blob, e))
}

/// Brings the file to its whole length, over as many connections as it takes.
fn transfer(client: &Client, wanted: &Wanted, partial: &mut Partial, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let mut attempts = 0;
    while partial.len < wanted.size {
        let before = partial.len;
        let failure = match client.get(&wanted.url, partial.len) {
            Ok((_, response)) => receive(response, wanted, partial, progress)?,
            Err(failure) if failure.is_passing() => Some(failure),
            Err(failure) => return Err(failure.explain(wanted.url.clone())),
        };
        attempts = if partial.len > before { 0 } else { attempts + 1 };
        let Some(failure) = failure else { continue };
        if attempts >= ATTEMPTS {
            let e = failure.explain(wanted.url.clone());
            return Err(e.expected(format!("{} bytes; {} are there and kept", wanted.size, partial.len)));
        }
        let wait = match failure {
            Failure::Status { retry_after: Some(wait), .. } => wait,
            _ => Duration::from_millis(200 << attempts),
        };
        std::thread::sleep(wait);
    }
    Ok(())
}

/// Appends what one connection brings; the reason why it brought no more, if it did not bring everything.
fn receive(
    response: Response<Body>,
    wanted: &Wanted,
    partial: &mut Partial,
    progress: &mut dyn FnMut(u64),
) -> Result<Option<Failure>> {
    if response.status() == 206 {
        let range = text(response.headers(), "content-range").to_owned();
        let expected = format!("bytes {}-", partial.len);
        let total = range.rsplit('/').next().and_then(|n| n.parse::<u64>().ok());
        if !range.starts_with(&expected) || total.is_some_and(|total| total != wanted.size) {
            return Err(Error::new("the hub sent another part of the file than was asked for")
                .at(wanted.url.clone())
                .expected(format!("{expected}{}/{}", wanted.size - 1, wanted.size))
                .found(range)
                .next("try again; if it repeats, check HF_ENDPOINT"));
        }
    } else if partial.len > 0 {
        // A server without ranges begins again.
        partial.restart(wanted)?;
    }
    let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0; CHUNK];
    loop {
        match body.read(&mut buffer) {
            Ok(0) if partial.len < wanted.size => {
                return Ok(Some(Failure::Network(format!("the connection ended after {} bytes", partial.len))));
            }
            Ok(0) => return Ok(None),
            Ok(n) if partial.len + n as u64 > wanted.size => {
                partial.restart(wanted)?;
                return Err(Error::new("the hub sent more than the file has")
                    .at(wanted.url.clone())
                    .expected(format!("{} bytes", wanted.size))
                    .found("more")
                    .next("it was not kept: try again; if it repeats, check HF_ENDPOINT"));
            }
            Ok(n) => {
                partial.write(&buffer[..n])?;
                progress(partial.len);
                interrupt::check(|| format!("downloading {}; what is there is kept", wanted.name))?;
            }
            Err(e) => return Ok(Some(Failure::Network(e.to_string()))),
        }
    }
}

/// Puts a relative link to the blob at `path`, in one step.
fn link(blob: &Path, path: &Path) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    files::create_dir_all(dir)?;
    let repo = blob.parent().and_then(Path::parent).unwrap_or(Path::new(""));
    let depth = dir.strip_prefix(repo).map_or(0, |inside| inside.components().count());
    let target: PathBuf = std::iter::repeat_n("..", depth).collect::<PathBuf>().join("blobs");
    let target = target.join(blob.file_name().unwrap_or_default());
    let tmp = dir.join(format!(
        ".tunebook-{}-{}",
        std::process::id(),
        blob.file_name().unwrap_or_default().to_string_lossy()
    ));
    _ = fs::remove_file(&tmp);
    std::os::unix::fs::symlink(&target, &tmp).map_err(|e| Error::io("create a link", &tmp, e))?;
    fs::rename(&tmp, path).map_err(|e| Error::io("rename into place", path, e))
}

/// Whether a file of the cache is what its blob's name says; `None` when the name is no hash.
pub(super) fn verify(path: &Path) -> Result<Option<bool>> {
    let blob = fs::canonicalize(path).map_err(|e| Error::io("find", path, e))?;
    let name = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some(checksum) = Checksum::from_etag(&name) else { return Ok(None) };
    let mut file = File::open(&blob).map_err(|e| Error::io("read", &blob, e))?;
    let size = file.metadata().map_err(|e| Error::io("read", &blob, e))?.len();
    let mut hasher = checksum.hasher(size);
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer).map_err(|e| Error::io("read", &blob, e))? {
            0 => return Ok(Some(hasher.finish() == checksum.hex())),
            n => hasher.update(&buffer[..n]),
        }
    }
}
