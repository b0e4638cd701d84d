//! What a repository holds, as the hub's list says it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::checksum::Checksum;
use super::client::{Client, Failure, text};
use super::fetch::Wanted;
use crate::{Error, Result};

/// The files of one commit.
#[derive(Debug)]
pub(super) struct Listing {
    /// The commit.
    pub commit: String,
    files: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Listing {
    /// Asks for the list; an answer that cannot be understood is the inner error.
    pub fn get(client: &Client, url: &str) -> Result<Result<Self>, Failure> {
        let (_, response) = client.get(url, 0)?;
        // The list of a repository with 100,000 files.
        let body = response.into_body().into_with_config().limit(64 << 20).read_to_vec();
        let body = body.map_err(|e| Failure::Network(e.to_string()))?;
        let bad = |found: String| {
            Error::new("the hub's answer cannot be understood")
                .at(url.to_owned())
                .expected("a commit and a list of files")
                .found(found)
                .next("check HF_ENDPOINT")
        };
        Ok(match serde_json::from_slice::<Answer>(&body) {
            Ok(answer) if is_commit(&answer.sha) => Ok(Listing { commit: answer.sha, files: answer.siblings }),
            Ok(answer) => Err(bad(format!("the commit `{}`", answer.sha))),
            Err(e) => Err(bad(e.to_string())),
        })
    }

    /// Names of all files.
    pub fn names(&self) -> Vec<String> {
        self.files.iter().map(|f| f.rfilename.clone()).collect()
    }

    /// What the file at `url` must be: from the list, or where a mirror's list does not say it, from the file's own headers.
    pub fn wanted(&self, client: &Client, name: &str, url: String) -> Result<Wanted> {
        let Some(file) = self.files.iter().find(|f| f.rfilename == name) else {
            return Err(Error::new("the repository has no such file")
                .at(url)
                .expected(name)
                .found(self.names().join(", ").chars().take(400).collect::<String>())
                .next("check the id; a model needs config.json and safetensors"));
        };
        let lfs = file.lfs.as_ref();
        let sum = lfs.and_then(|l| l.sha256.as_deref()).or(file.blob_id.as_deref()).and_then(Checksum::from_etag);
        if let (Some(checksum), Some(size)) = (sum, lfs.and_then(|l| l.size).or(file.size)) {
            return Ok(Wanted { name: name.to_owned(), url, size, checksum });
        }
        let (headers, response) = client.get(&url, 0).map_err(|failure| failure.explain(url.clone()))?;
        let etag = |name: &str| Checksum::from_etag(text(&headers, name));
        let length = |name: &str| text(&headers, name).parse::<u64>().ok();
        let checksum = etag("x-linked-etag").or_else(|| etag("etag"));
        let size = length("x-linked-size").or_else(|| text(response.headers(), "content-length").parse().ok());
        match (checksum, size) {
            (Some(checksum), Some(size)) => Ok(Wanted { name: name.to_owned(), url, size, checksum }),
            _ => Err(Error::new("this hub does not say what the file must be")
                .at(url)
                .expected("its size and its SHA-256 or git hash, in the list or as etag")
                .found(format!("etag `{}`", text(&headers, "etag")))
                .next("use another HF_ENDPOINT, or download the files by other means and give their directory")),
        }
    }
}

/// Names of commits become parts of paths.
pub(super) fn is_commit(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// All files below a directory, sorted; links to files count as files.
pub(super) fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![];
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("read the directory", dir, e))? {
        let path = entry.map_err(|e| Error::io("read the directory", dir, e))?.path();
        if path.is_dir() { found.extend(files_below(&path)?) } else { found.push(path) }
    }
    found.sort();
    Ok(found)
}
