//! Data sets of the hub: which files are which split.

use std::collections::BTreeSet;
use std::path::PathBuf;

use hf_hub::RepoType;

use super::{Hub, list};
use crate::data::{RowFormat, Rows};
use crate::{Error, Result};

/// The splits, by the words that name them in files and directories; as the `datasets` library knows them.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

impl Rows {
    /// Downloads a split of a data set on the hub (or finds it in the cache) and reads it; see [`Hub::dataset`].
    ///
    /// # Errors
    /// As [`Hub::dataset`] and [`Rows::from_path`].
    pub fn from_hub(repo_id: &str, split: &str) -> Result<Self> {
        Hub::from_env()?.rows(repo_id, split)
    }
}

impl Hub {
    /// The rows of a split, from this hub.
    ///
    /// # Errors
    /// As [`Hub::dataset`] and [`Rows::from_path`].
    pub fn rows(&self, repo_id: &str, split: &str) -> Result<Rows> {
        let parts: Vec<Rows> =
            self.dataset(repo_id, None, split)?.iter().map(Rows::from_path).collect::<Result<_>>()?;
        Rows::concat(&parts)
    }

    /// Downloads the files of a split of a data set, and gives their paths in order.
    ///
    /// - `split`: `train`, `validation` or `test`. Files belong to a split by a word in their names or directories; where no
    ///   name has such a word, all are `train`. Of a data set with several directories (subsets), `directory/train`.
    ///
    /// # Errors
    /// As [`download`](super::download); a repository without rows, without that split, or with several subsets to choose
    /// from.
    pub fn dataset(&self, repo_id: &str, revision: Option<&str>, split: &str) -> Result<Vec<PathBuf>> {
        let repo = self.repo(repo_id, RepoType::Dataset, revision)?;
        let snapshot = self.snapshot(&repo);
        let Some(listing) = self.list_or(&repo, snapshot.is_some())? else {
            let dir = snapshot.ok_or_else(|| self.not_cached(&repo, repo_id))?;
            let relative = |path: PathBuf| path.strip_prefix(&dir).ok().map(|p| p.to_string_lossy().into_owned());
            let names: Vec<String> = list::files_below(&dir)?.into_iter().filter_map(relative).collect();
            return Ok(choose(&names, split, repo_id)?.iter().map(|name| dir.join(name)).collect());
        };
        let names = choose(&listing.names(), split, repo_id)?;
        let dir = self.fetch_all(&repo, &listing, &names)?;
        Ok(names.iter().map(|name| dir.join(name)).collect())
    }
}

/// The files of a split, in order.
fn choose(names: &[String], split: &str, repo_id: &str) -> Result<Vec<String>> {
    let (subset, wanted) = split.rsplit_once('/').map_or((None, split), |(subset, split)| (Some(subset), split));
    let wanted = SPLITS.iter().find(|(name, words)| *name == wanted || words.contains(&wanted)).map(|(name, _)| *name);
    let wanted = wanted.ok_or_else(|| {
        Error::new("this is no split of a data set")
            .at(repo_id)
            .expected("train, validation or test, or one of them behind a subset: subset/train")
            .found(split)
    })?;
    let data: Vec<&String> = names.iter().filter(|name| is_data(name)).collect();
    let format = most_frequent(&data).ok_or_else(|| {
        Error::new("this repository holds no rows")
            .at(repo_id)
            .expected(".parquet, .jsonl, .json, .csv or .tsv files")
            .found(names.join(", ").chars().take(400).collect::<String>())
            .next("data sets that are made by a script cannot be read: look for a converted copy")
    })?;
    let data: Vec<&String> = data.into_iter().filter(|n| RowFormat::of(n.as_str()).ok() == Some(format)).collect();
    let named = data.iter().any(|name| split_of(name).is_some());
    let mut chosen: Vec<String> = (data.iter())
        .filter(|name| split_of(name).unwrap_or("train") == wanted && (named || wanted == "train"))
        .filter(|name| !named || split_of(name).is_some())
        .filter(|name| subset.is_none_or(|subset| directory(name) == subset))
        .map(|name| (*name).clone())
        .collect();
    chosen.sort();
    let directories: BTreeSet<&str> = chosen.iter().map(|name| directory(name)).collect();
    if chosen.is_empty() {
        return Err(Error::new("the data set has no such split")
            .at(repo_id)
            .expected(format!("files of the split `{split}`"))
            .found(data.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ").chars().take(400).collect::<String>())
            .next("choose another split; Rows::split makes an evaluation split of train"));
    }
    if directories.len() > 1 {
        let choices: Vec<String> = directories.iter().map(|d| format!("`{d}/{wanted}`")).collect();
        return Err(Error::new("the data set has several subsets")
            .at(repo_id)
            .expected(format!("one of {}", choices.join(", ")))
            .found(format!("`{split}`"))
            .next("name the subset before the split"));
    }
    Ok(chosen)
}

/// Files with rows; not those that describe the data set.
fn is_data(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    let describes = ["dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json", "package.json"];
    let hidden = name.split('/').any(|part| part.is_empty() || part.starts_with('.'));
    !hidden && !describes.contains(&file) && RowFormat::of(name).is_ok()
}

fn most_frequent(names: &[&String]) -> Option<RowFormat> {
    // Of equally frequent ones, the first here.
    let order = [RowFormat::Parquet, RowFormat::Jsonl, RowFormat::Csv, RowFormat::Tsv, RowFormat::Json];
    let count = |format: RowFormat| names.iter().filter(|n| RowFormat::of(n.as_str()).ok() == Some(format)).count();
    order.into_iter().rev().max_by_key(|f| count(*f)).filter(|f| count(*f) > 0)
}

fn directory(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(directory, _)| directory)
}

/// The split that a name's words say, the file's own before its directory's.
fn split_of(name: &str) -> Option<&'static str> {
    let word_of = |part: &str| {
        let lower = part.to_ascii_lowercase();
        let words: Vec<&str> = lower.split(|c: char| !c.is_ascii_alphanumeric()).collect();
        SPLITS.iter().find(|(_, names)| names.iter().any(|n| words.contains(n))).map(|(split, _)| *split)
    };
    name.rsplit('/').find_map(word_of)
}
