//! Downloads, against a server on 127.0.0.1 that behaves like a hub and its store, at their worst.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Digest as _;
use tunebook::data::Rows;
use tunebook::model::Base;
use tunebook::model::hub::Hub;

use crate::support::golden;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the store does with a request for a file, once each, before it behaves.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Sends so many bytes and hangs up.
    Drop(usize),
    /// Sends other bytes.
    Wrong,
    /// Does not know ranges.
    NoRange,
    /// Answers with a status.
    Status(u16),
    /// Sends more than there is.
    TooMuch,
    /// Sends a little at a time.
    Slow,
    /// Answers with another range than was asked for.
    OtherRange,
}

struct File {
    bytes: Vec<u8>,
    /// Large files lie in the store, under their SHA-256.
    lfs: bool,
    faults: Vec<Fault>,
}

/// One request, as the servers saw it.
#[derive(Clone, Debug)]
struct Request {
    at: &'static str,
    path: String,
    token: Option<String>,
    start: usize,
}

#[derive(Default)]
struct State {
    /// By `models/owner/name` or `datasets/owner/name`.
    repos: HashMap<String, Vec<(String, File)>>,
    log: Vec<Request>,
    /// Whether the list leaves out sizes and hashes, as some mirrors' do.
    bare_list: bool,
}

struct FakeHub {
    state: Arc<Mutex<State>>,
    endpoint: String,
    cache: tempfile::TempDir,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&sha2::Sha256::digest(bytes))
}

fn git_sha1(bytes: &[u8]) -> String {
    let mut h = sha1::Sha1::new();
    h.update(format!("blob {}\0", bytes.len()));
    h.update(bytes);
    hex(&h.finalize())
}

impl FakeHub {
    fn new() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, store) = (bind(), bind());
        let endpoint = format!("http://{}", hub.local_addr().unwrap());
        let store_address = format!("http://{}", store.local_addr().unwrap());
        for (listener, at) in [(hub, "hub"), (store, "store")] {
            let (state, store) = (state.clone(), store_address.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    let (state, store) = (state.clone(), store.clone());
                    std::thread::spawn(move || serve(stream, at, &state, &store));
                }
            });
        }
        FakeHub { state, endpoint, cache: tempfile::tempdir().unwrap() }
    }

    fn put(&self, repo: &str, name: &str, bytes: impl Into<Vec<u8>>, lfs: bool, faults: &[Fault]) {
        let file = File { bytes: bytes.into(), lfs, faults: faults.to_vec() };
        let mut state = self.state.lock().unwrap();
        let files = state.repos.entry(repo.into()).or_default();
        files.retain(|(n, _)| n != name);
        files.push((name.into(), file));
    }

    /// A whole small model; `faults` are those of its weights.
    fn put_model(&self, faults: &[Fault]) {
        let read = |f: &str| std::fs::read(golden(&format!("tiny/tiny-mistral/base/{f}"))).unwrap();
        self.put("models/owner/tiny", "config.json", read("config.json"), false, &[]);
        self.put("models/owner/tiny", "generation_config.json", read("generation_config.json"), false, &[]);
        self.put("models/owner/tiny", "tokenizer.json", "{}", false, &[]);
        self.put("models/owner/tiny", "model.safetensors", read("model.safetensors"), true, faults);
        for not_wanted in ["consolidated.safetensors", "pytorch_model.bin", "onnx/model.safetensors"] {
            self.put("models/owner/tiny", not_wanted, "not wanted", true, &[]);
        }
    }

    fn hub(&self) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            cache_dir: self.cache.path().join("hub"),
            token: Some("secret".into()),
            offline: false,
        }
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    /// Where the requests for the weights began.
    fn weight_starts(&self) -> Vec<usize> {
        let weights = sha256(&weights());
        self.requests().iter().filter(|r| r.at == "store" && r.path.contains(&weights)).map(|r| r.start).collect()
    }
}

fn weights() -> Vec<u8> {
    std::fs::read(golden("tiny/tiny-mistral/base/model.safetensors")).unwrap()
}

fn serve(stream: TcpStream, at: &'static str, state: &Mutex<State>, store: &str) {
    let mut request = Request { at, path: String::new(), token: None, start: 0 };
    for line in BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok) {
        if let Some(rest) = line.strip_prefix("GET ") {
            request.path = rest.split(' ').next().unwrap().to_string();
        } else if let Some(range) = line.to_lowercase().strip_prefix("range: bytes=") {
            request.start = range.trim_end_matches('-').parse().unwrap();
        } else if line.to_lowercase().starts_with("authorization:") {
            request.token = line.split(' ').next_back().map(String::from);
        } else if line.is_empty() {
            break;
        }
    }
    state.lock().unwrap().log.push(request.clone());
    answer(stream, &request, state, store);
}

/// Status, headers, body.
fn send(mut stream: TcpStream, status: &str, headers: &str, length: usize, body: &[u8]) {
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n");
    _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}

fn answer(stream: TcpStream, request: &Request, state: &Mutex<State>, store: &str) {
    let path = request.path.split('?').next().unwrap().to_string();
    if let Some(hash) = path.strip_prefix("/store/") {
        return send_file(stream, request, state, |file| file.lfs && sha256(&file.bytes) == hash);
    }
    if path.contains("owner/gated") && request.token.as_deref() != Some("secret") {
        let said = "x-error-code: GatedRepo\r\nx-error-message: Access to model owner/gated is restricted.\r\n";
        return send(stream, "401 Unauthorized", said, 0, b"");
    }
    if let Some((repo, _)) = path.strip_prefix("/api/").and_then(|p| p.split_once("/revision/")) {
        let state = state.lock().unwrap();
        let Some(files) = state.repos.get(repo) else { return send(stream, "404 Not Found", "", 0, b"") };
        let sibling = |(name, f): &(String, File)| match (state.bare_list, f.lfs) {
            (true, _) => json!({ "rfilename": name }),
            (_, true) => json!({"rfilename": name, "size": f.bytes.len(), "blobId": git_sha1(b"pointer"),
                "lfs": {"sha256": sha256(&f.bytes), "size": f.bytes.len(), "pointerSize": 134}}),
            (_, false) => json!({"rfilename": name, "size": f.bytes.len(), "blobId": git_sha1(&f.bytes)}),
        };
        let list: Vec<Value> = files.iter().map(sibling).collect();
        let body = json!({"sha": COMMIT, "siblings": list}).to_string();
        return send(stream, "200 OK", "content-type: application/json\r\n", body.len(), body.as_bytes());
    }
    let (repo, name) = path.trim_start_matches('/').split_once("/resolve/").unwrap_or_default();
    let repo = if repo.starts_with("datasets/") { repo.to_string() } else { format!("models/{repo}") };
    let name = name.split_once('/').unwrap_or_default().1.replace("%20", " ");
    let found = {
        let state = state.lock().unwrap();
        let file = state.repos.get(&repo).and_then(|files| files.iter().find(|(n, _)| *n == name));
        file.map(|(_, f)| (f.lfs, f.bytes.clone()))
    };
    match found {
        None => send(stream, "404 Not Found", "x-error-code: EntryNotFound\r\n", 0, b""),
        Some((true, bytes)) => {
            let sum = sha256(&bytes);
            let headers = format!(
                "location: {store}/store/{sum}\r\nx-linked-etag: \"{sum}\"\r\nx-linked-size: {}\r\nx-repo-commit: {COMMIT}\r\n",
                bytes.len()
            );
            send(stream, "302 Found", &headers, 0, b"");
        }
        Some((false, bytes)) => send_file(stream, request, state, |file| file.bytes == bytes),
    }
}

fn send_file(mut stream: TcpStream, request: &Request, state: &Mutex<State>, is: impl Fn(&File) -> bool) {
    let (bytes, fault) = {
        let mut state = state.lock().unwrap();
        let file = state.repos.values_mut().flatten().map(|(_, f)| f).find(|f| is(f)).unwrap();
        let fault = if file.faults.is_empty() { None } else { Some(file.faults.remove(0)) };
        (file.bytes.clone(), fault)
    };
    let etag = format!("etag: \"{}\"\r\n", git_sha1(&bytes));
    let start = if matches!(fault, Some(Fault::NoRange)) { 0 } else { request.start };
    let rest = &bytes[start..];
    let said = if matches!(fault, Some(Fault::OtherRange)) { start + 1 } else { start };
    let range = format!("{etag}content-range: bytes {said}-{}/{}\r\n", bytes.len() - 1, bytes.len());
    let (status, headers) = if start > 0 { ("206 Partial Content", range.as_str()) } else { ("200 OK", etag.as_str()) };
    match fault {
        Some(Fault::Status(code)) => send(stream, &format!("{code} Trouble"), "retry-after: 0\r\n", 0, b""),
        Some(Fault::Drop(n)) => send(stream, status, headers, rest.len(), &rest[..n]),
        Some(Fault::Wrong) => send(stream, status, headers, rest.len(), &vec![b'x'; rest.len()]),
        Some(Fault::TooMuch) => send(stream, status, headers, rest.len() + 5, &[rest, b"extra"].concat()),
        Some(Fault::Slow) => {
            send(stream.try_clone().unwrap(), status, headers, rest.len(), b"");
            for piece in rest.chunks(rest.len() / 20) {
                std::thread::sleep(Duration::from_millis(20));
                _ = stream.write_all(piece);
            }
        }
        Some(Fault::NoRange | Fault::OtherRange) | None => send(stream, status, headers, rest.len(), rest),
    }
}

/// Every path below a directory with what it is, as huggingface_hub lays it out.
fn tree(dir: &Path) -> Vec<String> {
    let mut found = vec![];
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(tree(&path).into_iter().map(|p| format!("{}/{p}", path.file_name().unwrap().display())));
        } else {
            let link = std::fs::read_link(&path).map(|to| format!(" -> {}", to.display())).unwrap_or_default();
            found.push(format!("{}{link}", path.file_name().unwrap().display()));
        }
    }
    found.sort();
    found
}

#[test]
fn models_are_downloaded_from_a_hub() {
    let fake = FakeHub::new();
    fake.put_model(&[]);
    let hub = fake.hub();
    assert!(!format!("{hub:?}").contains("secret"));
    assert_eq!(hub.spec("owner/tiny", None).unwrap().hidden_size, 64);
    let dir = hub.download("owner/tiny", None).unwrap();
    let base = Base::from_dir(&dir).unwrap();
    assert_eq!(base.checkpoint().read_bytes("model.norm.weight").unwrap().len(), 256);
    let requests = fake.requests();
    assert!(
        requests
            .iter()
            .all(|r| !r.path.contains("consolidated") && !r.path.contains("bin") && !r.path.contains("onnx"))
    );
    // The token is for the hub alone.
    assert!(requests.iter().any(|r| r.at == "store"));
    assert!(requests.iter().all(|r| r.token.is_some() == (r.at == "hub")), "{requests:#?}");
    // The second time only the list is asked for; a commit is not even asked for.
    assert_eq!(hub.download("owner/tiny", Some("main")).unwrap(), dir);
    assert_eq!(fake.requests().len(), 1);
    assert_eq!(hub.download("owner/tiny", Some(COMMIT)).unwrap(), dir);
    assert_eq!(fake.requests().len(), 0);
    // Without a network, or when it is not to be used, what is there is found.
    let gone = Hub { endpoint: "http://127.0.0.1:9".into(), ..hub.clone() };
    assert_eq!(gone.download("owner/tiny", None).unwrap(), dir);
    assert_eq!(gone.spec("owner/tiny", None).unwrap().hidden_size, 64);
    let offline = Hub { offline: true, ..hub.clone() };
    assert_eq!(offline.download("owner/tiny", None).unwrap(), dir);
    assert_eq!(fake.requests().len(), 0);
    let e = gone.download("owner/other", None).unwrap_err().to_string();
    assert!(e.contains("check the network") && e.contains("127.0.0.1:9"), "{e}");
    let e = offline.download("owner/other", None).unwrap_err().to_string();
    assert!(e.contains("HF_HUB_OFFLINE") && e.contains("owner/other"), "{e}");
}

#[test]
fn the_cache_is_laid_out_as_pythons() {
    let fake = FakeHub::new();
    fake.put_model(&[]);
    fake.hub().download("owner/tiny", None).unwrap();
    let read = |f: &str| std::fs::read(golden(&format!("tiny/tiny-mistral/base/{f}"))).unwrap();
    let git = |f: &str| git_sha1(&read(f));
    let (weights, tokenizer) = (sha256(&weights()), git_sha1(b"{}"));
    let small = [("config.json", git("config.json")), ("generation_config.json", git("generation_config.json"))];
    let mut expected = vec![format!("models--owner--tiny/refs/main")];
    for (name, blob) in
        small.iter().map(|(n, b)| (*n, b)).chain([("model.safetensors", &weights), ("tokenizer.json", &tokenizer)])
    {
        expected.push(format!("models--owner--tiny/blobs/{blob}"));
        expected.push(format!("models--owner--tiny/snapshots/{COMMIT}/{name} -> ../../blobs/{blob}"));
        expected.push(format!(".locks/models--owner--tiny/{blob}.lock"));
    }
    expected.sort();
    let mut found = tree(&fake.cache.path().join("hub"));
    found.sort();
    assert_eq!(found, expected);
    let main = fake.cache.path().join("hub/models--owner--tiny/refs/main");
    assert_eq!(std::fs::read_to_string(main).unwrap(), COMMIT);
    assert_eq!(fake.hub().verify("owner/tiny", None).unwrap(), 4);
}

#[test]
fn a_dropped_download_goes_on_where_it_stopped() {
    let n = weights().len();
    let fake = FakeHub::new();
    fake.put_model(&[Fault::Drop(1000), Fault::Status(503), Fault::Drop(0), Fault::Drop(n / 2), Fault::Status(429)]);
    let dir = fake.hub().download("owner/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights());
    let half = 1000 + n / 2;
    assert_eq!(fake.weight_starts(), [0, 1000, 1000, 1000, half, half]);
    // A server that is slow is waited for.
    let fake = FakeHub::new();
    fake.put_model(&[Fault::Slow]);
    fake.hub().download("owner/tiny", None).unwrap();
    assert_eq!(fake.weight_starts(), [0]);
}

#[test]
fn the_next_call_goes_on_with_what_an_interrupted_one_left() {
    let fake = FakeHub::new();
    fake.put_model(&[
        Fault::Drop(5000),
        Fault::Drop(0),
        Fault::Drop(0),
        Fault::Drop(0),
        Fault::Drop(0),
        Fault::Drop(0),
    ]);
    let e = fake.hub().download("owner/tiny", None).unwrap_err().to_string();
    assert!(e.contains("5000 are there and kept"), "{e}");
    fake.requests();
    assert!(!fake.cache.path().join("hub/models--owner--tiny/refs/main").exists());
    let dir = fake.hub().download("owner/tiny", None).unwrap();
    assert_eq!(fake.weight_starts(), [5000]);
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights());

    // A server that knows no ranges begins again; what was there is not counted twice.
    let fake = FakeHub::new();
    fake.put_model(&[Fault::Drop(5000), Fault::NoRange]);
    let dir = fake.hub().download("owner/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights());
    // What was left is wrong: found by the hash, and begun again.
    let fake = FakeHub::new();
    fake.put_model(&[]);
    let blobs = fake.cache.path().join("hub/models--owner--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{}.incomplete", sha256(&weights()))), vec![7; 3000]).unwrap();
    let dir = fake.hub().download("owner/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights());
    assert_eq!(fake.weight_starts(), [3000, 0]);
}

#[test]
fn files_that_are_not_what_the_hub_says_are_not_kept() {
    for (fault, what) in [(Fault::Wrong, "not what the hub says"), (Fault::TooMuch, "more than the file has")] {
        let fake = FakeHub::new();
        fake.put_model(&[fault]);
        let e = fake.hub().download("owner/tiny", None).unwrap_err().to_string();
        assert!(e.contains(what) && e.contains("it was not kept"), "{e}");
        let left: Vec<String> =
            tree(&fake.cache.path().join("hub")).into_iter().filter(|p| p.contains(&sha256(&weights()))).collect();
        assert!(left.iter().all(|p| p.ends_with(".lock") || p.ends_with(".incomplete")), "{left:?}");
        // The store has recovered.
        let dir = fake.hub().download("owner/tiny", None).unwrap();
        assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights());
    }
    let fake = FakeHub::new();
    fake.put_model(&[Fault::Drop(100), Fault::OtherRange]);
    let e = fake.hub().download("owner/tiny", None).unwrap_err().to_string();
    assert!(e.contains("another part of the file"), "{e}");
    // A small file, by its git hash.
    let fake = FakeHub::new();
    fake.put_model(&[]);
    fake.put("models/owner/tiny", "tokenizer_config.json", "{\"a\": 1}", false, &[Fault::Wrong]);
    let e = fake.hub().download("owner/tiny", None).unwrap_err().to_string();
    assert!(e.contains("not what the hub says") && e.contains("tokenizer_config.json"), "{e}");
    // Damage on the disk, later.
    fake.hub().download("owner/tiny", None).unwrap();
    let blob = fake.cache.path().join(format!("hub/models--owner--tiny/blobs/{}", sha256(&weights())));
    let mut bytes = weights();
    bytes[4000] ^= 1;
    std::fs::write(&blob, bytes).unwrap();
    let e = fake.hub().verify("owner/tiny", None).unwrap_err().to_string();
    assert!(e.contains("damaged") && !blob.exists(), "{e}");
    fake.hub().download("owner/tiny", None).unwrap();
    assert_eq!(fake.hub().verify("owner/tiny", None).unwrap(), 5);
}

#[test]
fn a_mirror_that_lists_no_hashes_is_asked_for_them() {
    let fake = FakeHub::new();
    fake.put_model(&[]);
    fake.state.lock().unwrap().bare_list = true;
    let dir = fake.hub().download("owner/tiny", None).unwrap();
    assert_eq!(fake.hub().verify("owner/tiny", None).unwrap(), 4);
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn refusals_say_what_to_do() {
    let fake = FakeHub::new();
    fake.put_model(&[Fault::Status(403)]);
    fake.put("models/owner/gguf", "model.gguf", "x", true, &[]);
    fake.put("models/owner/broken", "config.json", "{}", false, &[]);
    fake.put("models/owner/broken", "model.safetensors", "<html>", true, &[]);
    let read = std::fs::read(golden("tiny/tiny-mistral/base/config.json")).unwrap();
    fake.put("models/owner/gated", "config.json", read, false, &[]);
    let hub = fake.hub();
    let refused = |id: &str| hub.download(id, None).unwrap_err().to_string();
    let e = refused("owner/missing");
    assert!(e.contains("404") && e.contains("spelling"), "{e}");
    let e = refused("owner/tiny");
    assert!(e.contains("403") && e.contains("HF_TOKEN") && e.contains("model.safetensors"), "{e}");
    let e = refused("owner/gguf");
    assert!(e.contains("no safetensors") && e.contains("model.gguf"), "{e}");
    let e = refused("owner/broken");
    assert!(e.contains("too short") || e.contains("safetensors header"), "{e}");
    assert_eq!(hub.spec("owner/gated", None).unwrap().hidden_size, 64);
    let nobody = Hub { token: None, cache_dir: fake.cache.path().join("other"), ..hub.clone() };
    let e = nobody.spec("owner/gated", None).unwrap_err().to_string();
    assert!(e.contains("GatedRepo") && e.contains("accept its licence"), "{e}");
    for id in ["", "a/b/c", "../etc", "owner/..", "/x", "owner/na me", "a/b?x"] {
        assert!(hub.download(id, None).unwrap_err().to_string().contains("cannot be a model"), "{id}");
    }
    assert!(hub.download("owner/tiny", Some("../x")).is_err());
}

#[test]
fn two_programs_download_a_file_once() {
    let fake = FakeHub::new();
    fake.put_model(&[Fault::Slow]);
    let dirs: Vec<PathBuf> = std::thread::scope(|scope| {
        let both: Vec<_> = (0..2).map(|_| scope.spawn(|| fake.hub().download("owner/tiny", None).unwrap())).collect();
        both.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(dirs[0], dirs[1]);
    assert_eq!(fake.weight_starts(), [0]);
}

#[test]
fn the_environment_is_huggingface_hubs() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("token"), "from file\n").unwrap();
    let at = home.path().display().to_string();
    let hub = |vars: &[(&str, &str)]| {
        let vars: HashMap<String, String> = vars.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Hub::from_vars(move |name| vars.get(name).cloned())
    };
    let plain = hub(&[("HF_HOME", &at)]).unwrap();
    assert_eq!((plain.token.as_deref(), plain.offline), (Some("from file"), false));
    assert_eq!((plain.cache_dir, plain.endpoint.as_str()), (home.path().join("hub"), "https://huggingface.co"));
    let set =
        hub(&[("HF_HOME", &at), ("HF_TOKEN", "mine"), ("HF_HUB_CACHE", "/c"), ("HF_HUB_OFFLINE", "YES")]).unwrap();
    assert_eq!((set.token.as_deref(), set.offline, set.cache_dir), (Some("mine"), true, PathBuf::from("/c")));
    assert!(!hub(&[("HF_HOME", &at), ("HF_HUB_OFFLINE", "0")]).unwrap().offline);
    let missing = hub(&[("HF_HOME", &at), ("HF_TOKEN_PATH", "/nonexistent/token")]).unwrap_err().to_string();
    assert!(missing.contains("/nonexistent/token"), "{missing}");
}

#[test]
fn data_sets_are_found_by_split_and_subset() {
    let fake = FakeHub::new();
    let rows = |n: usize| (0..n).map(|i| format!("{{\"text\": \"row {i}\"}}\n")).collect::<String>();
    let put =
        |repo: &str, name: &str, bytes: String| fake.put(&format!("datasets/owner/{repo}"), name, bytes, false, &[]);
    put("plain", "README.md", "# hello".into());
    put("plain", "dataset_infos.json", "{}".into());
    put("plain", "data/train-00001-of-00002.jsonl", rows(2));
    put("plain", "data/train-00000-of-00002.jsonl", rows(3));
    put("plain", "data/test 1.jsonl", rows(1));
    put("one", "guanaco.jsonl", rows(4));
    put("subsets", "main/train.csv", "text\na\n".into());
    put("subsets", "socratic/train.csv", "text\nb\nc\n".into());
    put("script", "loader.py", "".into());
    let hub = fake.hub();
    assert_eq!(hub.rows("owner/plain", "train").unwrap().len(), 5);
    assert_eq!(hub.rows("owner/plain", "test").unwrap().len(), 1);
    assert_eq!(hub.rows("owner/one", "train").unwrap().len(), 4);
    assert_eq!(hub.rows("owner/subsets", "socratic/train").unwrap().len(), 2);
    let error = |repo: &str, split: &str| hub.rows(repo, split).unwrap_err().to_string();
    let e = error("owner/subsets", "train");
    assert!(e.contains("`main/train`") && e.contains("`socratic/train`"), "{e}");
    let e = error("owner/one", "validation");
    assert!(e.contains("no such split") && e.contains("guanaco.jsonl"), "{e}");
    assert!(error("owner/script", "train").contains("made by a script"));
    assert!(error("owner/plain", "trian").contains("no split"));
    assert!(error("owner/none", "train").contains("404"));
    // From the cache, and in order.
    let offline = Hub { offline: true, ..hub };
    let rows: Rows = offline.rows("owner/plain", "train").unwrap();
    assert_eq!((rows.len(), rows.place(0).contains("00000-of"), rows.place(4).ends_with("jsonl:2")), (5, true, true));
}
