//! Models from the Hugging Face hub, through its cache (`~/.cache/huggingface/hub`, or under `HF_HOME`).
//!
//! `HF_ENDPOINT` names a mirror, `HF_TOKEN` (or the file that `hf auth login` writes) opens gated models.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::outdir::is_side_file;
use super::{Base, Checkpoint, ModelSpec};
use crate::{Error, Result};

/// Downloads a model (config, generation config, tokenizer, safetensors) and gives its directory in the hub's cache.
///
/// `repo_id` is `owner/name`; `revision` a branch, tag or commit, `main` when `None`. Files that are in the cache are not
/// downloaded again; without a network, a model that is there whole is found.
///
/// # Errors
/// An id that cannot be one, a model that does not exist or is gated, no network, a full disk: each with the next step.
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
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = if self.token.is_some() { "with a token" } else { "without a token" };
        write!(f, "Hub({}, cache {}, {token})", self.endpoint, self.cache_dir.display())
    }
}

impl Hub {
    /// The hub as the environment says: `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`.
    ///
    /// # Errors
    /// Neither `HF_HOME` nor a home directory.
    pub fn from_env() -> Result<Self> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let home = var("HF_HOME").map(PathBuf::from);
        let home = home.or_else(|| std::env::home_dir().map(|h| h.join(".cache/huggingface"))).ok_or_else(|| {
            Error::new("there is no place for downloads")
                .expected("HF_HOME or a home directory")
                .found("neither")
                .next("set HF_HOME to a directory with enough space")
        })?;
        let cache_dir = home.join("hub");
        let token = var("HF_TOKEN").or_else(|| Cache::new(cache_dir.clone()).token());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Ok(Hub { endpoint, cache_dir, token })
    }

    /// As [`download`], from this hub.
    ///
    /// # Errors
    /// As there.
    pub fn download(&self, repo_id: &str, revision: Option<&str>) -> Result<PathBuf> {
        let revision = revision.unwrap_or("main");
        check_names(repo_id, revision)?;
        let (api, names, commit) = match self.list(repo_id, revision) {
            Ok(found) => found,
            Err(e) => return self.cached(repo_id, revision).ok_or(e),
        };
        let wanted = wanted(&names);
        if !wanted.iter().any(|n| n.ends_with(".safetensors")) {
            let found = names.join(", ");
            return Err(Error::new("this repository holds no safetensors model")
                .at(repo_id)
                .expected("config.json and model.safetensors, or shards with an index")
                .found(found.chars().take(400).collect::<String>())
                .next("choose a repository with the model in transformers' form; GGUF files are another format"));
        }
        // By the commit, so that all files are of one state of the model.
        let repo = api.repo(Repo::with_revision(repo_id.into(), RepoType::Model, commit.clone()));
        let mut dir = None;
        for name in &wanted {
            let path = self.fetch(&repo, repo_id, name)?;
            dir = path.parent().map(Path::to_path_buf);
        }
        // The branch points to what is there now, for a time without a network.
        let cache = Cache::new(self.cache_dir.clone());
        let branch = Repo::with_revision(repo_id.into(), RepoType::Model, revision.into());
        cache.repo(branch).create_ref(&commit).map_err(|e| Error::io("write", &self.cache_dir, e))?;
        dir.ok_or_else(|| Error::new("the repository is empty").at(repo_id))
    }

    /// The shape of a model, downloading only its `config.json`.
    ///
    /// # Errors
    /// As [`download`] and [`ModelSpec::from_json`].
    pub fn spec(&self, repo_id: &str, revision: Option<&str>) -> Result<ModelSpec> {
        let revision = revision.unwrap_or("main");
        check_names(repo_id, revision)?;
        let repo = self.api(repo_id)?.repo(Repo::with_revision(repo_id.into(), RepoType::Model, revision.into()));
        let path = repo.get("config.json").map_err(|e| self.explain(e, repo_id, "config.json"))?;
        ModelSpec::from_json(repo_id, &crate::files::read_to_string(path)?)
    }

    fn api(&self, repo_id: &str) -> Result<Api> {
        ApiBuilder::from_cache(Cache::new(self.cache_dir.clone()))
            .with_endpoint(self.endpoint.trim_end_matches('/').to_string())
            .with_token(self.token.clone())
            .with_progress(false)
            .with_retries(3)
            .build()
            .map_err(|e| self.explain(e, repo_id, "the connection"))
    }

    /// Names of the files and the commit of a revision.
    fn list(&self, repo_id: &str, revision: &str) -> Result<(Api, Vec<String>, String)> {
        let api = self.api(repo_id)?;
        let repo = api.repo(Repo::with_revision(repo_id.into(), RepoType::Model, revision.into()));
        let info = repo.info().map_err(|e| self.explain(e, repo_id, revision))?;
        if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(Error::new("the hub's answer cannot be understood")
                .at(self.endpoint.clone())
                .expected("a commit")
                .found(info.sha)
                .next("check HF_ENDPOINT"));
        }
        let names = info.siblings.into_iter().map(|s| s.rfilename).collect();
        Ok((api, names, info.sha))
    }

    fn fetch(&self, repo: &ApiRepo, repo_id: &str, name: &str) -> Result<PathBuf> {
        let path = repo.get(name).map_err(|e| self.explain(e, repo_id, name))?;
        if name.ends_with(".safetensors")
            && let Err(e) = Checkpoint::open(&path)
        {
            // A damaged file would be found in the cache for ever.
            if let Ok(blob) = std::fs::canonicalize(&path) {
                let _ = std::fs::remove_file(blob);
            }
            let _ = std::fs::remove_file(&path);
            return Err(e.at(repo_id.to_string()).next("the damaged file was removed from the cache: download again"));
        }
        Ok(path)
    }

    /// The directory of a model that is in the cache whole.
    fn cached(&self, repo_id: &str, revision: &str) -> Option<PathBuf> {
        let repo = Repo::with_revision(repo_id.into(), RepoType::Model, revision.into());
        let config = Cache::new(self.cache_dir.clone()).repo(repo).get("config.json")?;
        let dir = config.parent()?.to_path_buf();
        Checkpoint::open(&dir).ok().map(|_| dir)
    }

    fn explain(&self, e: ApiError, repo_id: &str, what: &str) -> Error {
        let text = e.to_string();
        let next = if ["401", "403"].iter().any(|s| text.contains(&format!("status: {s}"))) {
            "the model is gated or does not exist: accept its licence on its page, then set HF_TOKEN or run `hf auth login`"
        } else if text.contains("status: 404") {
            "check the spelling of the id (owner/name) and of the revision"
        } else if matches!(e, ApiError::IoError(_)) {
            "check the space and permissions of the cache directory (HF_HOME), and the network"
        } else if matches!(e, ApiError::LockAcquisition(_)) {
            "another program is downloading this file: wait for it"
        } else {
            "check the network; HF_ENDPOINT names a mirror; a model directory that is there already needs no hub"
        };
        Error::new("the download failed")
            .at(format!("{}/{repo_id}: {what}", self.endpoint))
            .expected("an answer from the hub")
            .found(text)
            .next(next)
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
    Err(Error::new("this cannot be a model on the hub")
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
