//! Models and data sets from the Hugging Face hub, through the cache that Python's huggingface_hub uses as well.
//!
//! The environment is huggingface_hub's: `HF_ENDPOINT` names a mirror; `HF_TOKEN` (or the file that `hf auth login` writes, or
//! `HF_TOKEN_PATH`) opens gated repositories and is shown to the hub alone, not to the stores it sends to; `HF_HUB_CACHE` or
//! `HF_HOME` say where files are kept; with `HF_HUB_OFFLINE=1` only what is there is used.
//!
//! A download that is interrupted goes on where it stopped, within a call and in the next one, and every file's hash is
//! compared with what the hub says of it before it gets its name. `hf-hub` does neither; its names of places are used.

mod checksum;
mod client;
mod dataset;
mod fetch;
mod list;
mod progress;

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo, RepoType};

use super::outdir::is_side_file;
use super::{Base, Checkpoint, ModelSpec};
use crate::{Error, Result, files};
use client::{Client, Failure};
use fetch::{Places, Wanted};
use list::Listing;
pub use progress::DownloadProgress;
use progress::Reporter;

/// Downloads a model (config, generation config, tokenizer, safetensors) and gives its directory in the hub's cache.
///
/// `repo_id` is `owner/name`; `revision` a branch, tag or commit, `main` when `None`. Files that are in the cache are not
/// downloaded again; without a network, a model that is there whole is found.
///
/// # Errors
/// An id that cannot be one, a model that does not exist or is gated, no network, a full disk, a file that is not what the
/// hub says it is: each with the next step.
pub fn download(repo_id: &str, revision: Option<&str>) -> Result<PathBuf> {
    Hub::from_env()?.download(repo_id, revision)
}

/// Where models come from and where they are kept.
#[derive(Clone)]
pub struct Hub {
    /// `https://huggingface.co` or a mirror.
    pub endpoint: String,
    /// The cache directory that holds `models--owner--name`.
    pub cache_dir: PathBuf,
    /// Opens gated models.
    pub token: Option<String>,
    /// Only the cache is used.
    pub offline: bool,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = if self.token.is_some() { "with a token" } else { "without a token" };
        let offline = if self.offline { ", offline" } else { "" };
        write!(f, "Hub({}, cache {}, {token}{offline})", self.endpoint, self.cache_dir.display())
    }
}

impl Hub {
    /// The hub as the environment says; see the module.
    ///
    /// # Errors
    /// Neither a cache directory in the environment nor a home directory; a token file that is named and cannot be read.
    pub fn from_env() -> Result<Self> {
        Hub::from_vars(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    /// [`from_env`](Self::from_env) with variables from elsewhere.
    ///
    /// # Errors
    /// As there.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let is_on = |name: &str| var(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&&*v.to_lowercase()));
        let home = var("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| var("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("huggingface")))
            .or_else(|| std::env::home_dir().map(|h| h.join(".cache/huggingface")));
        let cache_dir = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let cache_dir = cache_dir.or_else(|| home.as_ref().map(|h| h.join("hub"))).ok_or_else(|| {
            Error::new("there is no place for downloads")
                .expected("HF_HUB_CACHE, HF_HOME or a home directory")
                .found("none of them")
                .next("set HF_HOME to a directory with enough space")
        })?;
        let token_file = match var("HF_TOKEN_PATH") {
            Some(path) => Some(files::read_to_string(path)?),
            None => home.and_then(|h| fs::read_to_string(h.join("token")).ok()),
        };
        let token = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")).or(token_file);
        Ok(Hub {
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            cache_dir,
            token: token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
        })
    }

    /// As [`download`], from this hub.
    ///
    /// # Errors
    /// As there.
    pub fn download(&self, repo_id: &str, revision: Option<&str>) -> Result<PathBuf> {
        let repo = self.repo(repo_id, RepoType::Model, revision)?;
        let cached =
            || self.snapshot(&repo).filter(|dir| dir.join("config.json").exists() && Checkpoint::open(dir).is_ok());
        let Some(listing) = self.list_or(&repo, cached().is_some())? else {
            return cached().ok_or_else(|| self.not_cached(&repo, repo_id));
        };
        let mut names = wanted(&listing.names());
        if !names.iter().any(|n| n.ends_with(".safetensors")) {
            let found = listing.names().join(", ");
            return Err(Error::new("this repository holds no safetensors model")
                .at(repo_id)
                .expected("config.json and model.safetensors, or shards with an index")
                .found(found.chars().take(400).collect::<String>())
                .next("choose a repository with the model in transformers' form; GGUF files are another format"));
        }
        // Weights last: a directory in which they are whole has all the rest.
        names.sort_by_key(|n| n.ends_with(".safetensors"));
        let dir = self.fetch_all(&repo, &listing, &names)?;
        // Right by its hash, and yet not a model: the repository itself is broken.
        Checkpoint::open(&dir).map_err(|e| e.at(repo_id.to_owned()))?;
        Ok(dir)
    }

    /// The shape of a model, downloading only its `config.json`.
    ///
    /// # Errors
    /// As [`download`] and [`ModelSpec::from_json`].
    pub fn spec(&self, repo_id: &str, revision: Option<&str>) -> Result<ModelSpec> {
        let repo = self.repo(repo_id, RepoType::Model, revision)?;
        let cached = || self.snapshot(&repo).map(|dir| dir.join("config.json")).filter(|path| path.exists());
        let path = match self.list_or(&repo, cached().is_some())? {
            Some(listing) => self.fetch_all(&repo, &listing, &["config.json".into()])?.join("config.json"),
            None => cached().ok_or_else(|| self.not_cached(&repo, repo_id))?,
        };
        ModelSpec::from_json(repo_id, &files::read_to_string(path)?)
    }

    /// Reads every file of a model in the cache again and compares it with its hash. Gives the number of files.
    ///
    /// # Errors
    /// A model that is not in the cache, or a file that is damaged: removed, so that the next download brings it again.
    pub fn verify(&self, repo_id: &str, revision: Option<&str>) -> Result<usize> {
        let repo = self.repo(repo_id, RepoType::Model, revision)?;
        let dir = self.snapshot(&repo).ok_or_else(|| self.not_cached(&repo, repo_id))?;
        let mut checked = 0;
        for path in list::files_below(&dir)? {
            if fetch::verify(&path)? == Some(false) {
                let blob = fs::canonicalize(&path).map_err(|e| Error::io("find", &path, e))?;
                for gone in [&blob, &path] {
                    fs::remove_file(gone).map_err(|e| Error::io("remove the damaged file", gone, e))?;
                }
                return Err(Error::new("a file in the cache is damaged")
                    .at_path(&path)
                    .expected(format!("the hash {}", blob.file_name().unwrap_or_default().to_string_lossy()))
                    .found("another one")
                    .next("it was removed: download again"));
            }
            checked += 1;
        }
        Ok(checked)
    }

    fn repo(&self, repo_id: &str, kind: RepoType, revision: Option<&str>) -> Result<Repo> {
        let revision = revision.unwrap_or("main");
        check_names(repo_id, revision)?;
        Ok(Repo::with_revision(repo_id.into(), kind, revision.into()))
    }

    fn client(&self) -> Client {
        Client::new(&self.endpoint, self.token.clone())
    }

    fn places(&self, repo: &Repo, commit: &str) -> Places {
        let folder = repo.folder_name();
        let snapshot = Cache::new(self.cache_dir.clone()).repo(repo.clone()).pointer_path(commit);
        Places { repo: self.cache_dir.join(&folder), locks: self.cache_dir.join(".locks").join(folder), snapshot }
    }

    /// The directory of a revision in the cache: a commit itself, or the one that a branch had when it was last seen.
    fn snapshot(&self, repo: &Repo) -> Option<PathBuf> {
        let branch = self.cache_dir.join(repo.folder_name()).join("refs").join(repo.revision());
        let commit = fs::read_to_string(branch).ok().map(|text| text.trim().to_owned()).filter(|c| list::is_commit(c));
        let dir = self.places(repo, commit.as_deref().unwrap_or(repo.revision())).snapshot;
        dir.is_dir().then_some(dir)
    }

    /// What is in the repository; `None`: the hub cannot be asked, or need not be, and `cached` is what there is.
    fn list_or(&self, repo: &Repo, cached: bool) -> Result<Option<Listing>> {
        // A commit never changes.
        if self.offline || (cached && repo.revision().len() == 40 && list::is_commit(repo.revision())) {
            return Ok(None);
        }
        let url = format!("{}/api/{}?blobs=true", self.base(), repo.api_url());
        match Listing::get(&self.client(), &url) {
            Ok(listing) => Ok(Some(listing?)),
            Err(Failure::Network(_) | Failure::Status { code: 500.., .. }) if cached => Ok(None),
            Err(failure) => Err(failure.explain(url)),
        }
    }

    fn not_cached(&self, repo: &Repo, repo_id: &str) -> Error {
        let found = match self.snapshot(repo) {
            Some(dir) => format!("part of it in {}", dir.display()),
            None => format!("nothing of it in {}", self.cache_dir.display()),
        };
        let error = Error::new("this is not in the cache whole")
            .at(format!("{repo_id} at {}", repo.revision()))
            .expected("all of its files")
            .found(found);
        if self.offline {
            error.next("the hub is not asked (HF_HUB_OFFLINE): unset it, or copy the files into the cache")
        } else {
            error.next("download it first")
        }
    }

    fn base(&self) -> &str {
        self.endpoint.trim_end_matches('/')
    }

    /// Downloads these files of one commit, and gives their directory.
    fn fetch_all(&self, repo: &Repo, listing: &Listing, names: &[String]) -> Result<PathBuf> {
        let (client, places) = (self.client(), self.places(repo, &listing.commit));
        let wanted: Vec<Wanted> = (names.iter())
            .map(|name| {
                let (kind, commit, file) = (repo.url(), &listing.commit, client::escape(name));
                listing.wanted(&client, name, format!("{}/{kind}/resolve/{commit}/{file}", self.base()))
            })
            .collect::<Result<_>>()?;
        self.check_space(wanted.iter().map(|w| places.missing(w)).sum())?;
        let mut reporter = Reporter::new(repo.url(), wanted.iter().map(|w| w.size).sum());
        for file in &wanted {
            reporter.begin(&file.name, file.size);
            fetch::fetch(&client, &places, file, &mut |bytes| reporter.bytes(bytes))?;
        }
        reporter.finish();
        // The branch points to what is there now, for a time without a network.
        let branch = self.cache_dir.join(repo.folder_name()).join("refs").join(repo.revision());
        files::create_dir_all(branch.parent().unwrap_or(&self.cache_dir))?;
        files::write_atomic_bytes(&branch, listing.commit.as_bytes())?;
        Ok(places.snapshot)
    }

    /// Before the first byte, not after the first 10 GB.
    fn check_space(&self, needed: u64) -> Result<()> {
        files::create_dir_all(&self.cache_dir)?;
        match files::free_bytes(&self.cache_dir) {
            Ok(free) if free < needed => Err(Error::new("there is not enough space for the download")
                .at_path(&self.cache_dir)
                .expected(format!("{needed} bytes free"))
                .found(format!("{free} bytes"))
                .next("free some space, or set HF_HOME to a directory on a larger disk")),
            _ => Ok(()),
        }
    }
}

impl Base {
    /// Downloads a model from the hub (or finds it in the cache) and opens it; see [`download`].
    ///
    /// # Errors
    /// As [`download`] and [`Base::from_dir`].
    pub fn from_hub(repo_id: &str) -> Result<Self> {
        Base::from_dir(download(repo_id, None)?)
    }
}

impl ModelSpec {
    /// The shape of a model on the hub: only its `config.json` is downloaded.
    ///
    /// # Errors
    /// As [`download`] and [`ModelSpec::from_json`].
    pub fn from_hub(repo_id: &str) -> Result<Self> {
        Hub::from_env()?.spec(repo_id, None)
    }
}

/// Both become parts of paths and addresses.
fn check_names(repo_id: &str, revision: &str) -> Result<()> {
    let part = |p: &str| {
        !p.is_empty() && !p.starts_with('.') && p.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    let good_id = repo_id.split('/').count() <= 2 && repo_id.split('/').all(part) && !repo_id.contains("..");
    let good_revision = revision.split('/').all(part) && !revision.contains("..");
    if good_id && good_revision {
        return Ok(());
    }
    Err(Error::new("this cannot be a model or data set on the hub")
        .at(repo_id.to_string())
        .expected("owner/name, for example mistralai/Mistral-7B-v0.1, and a branch, tag or commit")
        .found(format!("`{repo_id}` at `{revision}`"))
        .next("copy the id from the model's page; for a directory use Base::from_dir"))
}

/// What a model directory needs of a repository: Mistral's `consolidated.safetensors` and copies in other formats stay.
fn wanted(names: &[String]) -> Vec<String> {
    let weights = |n: &str| {
        n == "model.safetensors"
            || n == "model.safetensors.index.json"
            || (n.starts_with("model-") && n.ends_with(".safetensors"))
    };
    // Also keeps names out that an address could not hold.
    let plain = |n: &str| n.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    let wanted = |n: &&String| plain(n) && (n.as_str() == "config.json" || weights(n) || is_side_file(n));
    names.iter().filter(wanted).cloned().collect()
}
