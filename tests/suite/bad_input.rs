//! Every kind of file that comes from elsewhere, damaged in every way that it can be: an error that says where, never a
//! panic, never a hang, never a result.
//!
//! One row of a table for each way: what is wrong, how a whole file becomes so, and words of the error.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tunebook::data::{ChatOptions, ChatTemplate, DataConfig, RowFile, Rows, Tokenizer, encode, message};
use tunebook::lora::Adapter;
use tunebook::model::{Base, Checkpoint, ModelSpec};

use crate::support::golden;
use crate::tiny_tokenizer::{tiny_tokenizer, tokenizer_json};

type Edit = Box<dyn Fn(&[u8]) -> Vec<u8>>;
type Outcome = Result<(), tunebook::Error>;

/// One way in which a file is bad.
struct Row {
    what: &'static str,
    edit: Edit,
    says: &'static str,
}

fn row(what: &'static str, says: &'static str, edit: impl Fn(&[u8]) -> Vec<u8> + 'static) -> Row {
    Row { what, edit: Box::new(edit), says }
}

/// Another content altogether.
fn text(what: &'static str, says: &'static str, content: impl AsRef<[u8]>) -> Row {
    let content = content.as_ref().to_vec();
    row(what, says, move |_| content.clone())
}

/// A text in the place of another, which must be there.
fn swap(what: &'static str, says: &'static str, from: &'static str, to: impl Into<String>) -> Row {
    let to = to.into();
    row(what, says, move |bytes| {
        let whole = String::from_utf8(bytes.to_vec()).unwrap();
        assert!(whole.contains(from), "{from}");
        whole.replacen(from, &to, 1).into_bytes()
    })
}

fn half(what: &'static str, says: &'static str) -> Row {
    row(what, says, |bytes| bytes[..bytes.len() / 2].to_vec())
}

/// Ways in which any JSON file can be bad.
fn any_json() -> Vec<Row> {
    vec![
        half("cut in half", ""),
        text("empty", "", ""),
        text("not JSON", "", "<html>404</html>"),
        text("a list", "", "[1, 2, 3]"),
        text("a number", "", "3"),
        text("not UTF-8", "", b"{\"a\": \"\xff\xfe\"}"),
        text("nested 100,000 deep", "", "[".repeat(100_000)),
        text("nested 100,000 deep in a field", "", format!("{{\"a\": {}", "{\"a\": ".repeat(100_000))),
        row("something behind the end", "", |bytes| [bytes, b"}"].concat()),
        row("zero bytes", "", |bytes| vec![0; bytes.len()]),
    ]
}

/// Runs a table: `name` in a copy of the files of `from` becomes bad, and `open` is to refuse it, naming the file.
fn table(from: &Path, files: &[&str], name: &str, rows: Vec<Row>, open: &dyn Fn(&Path) -> Outcome) {
    let whole = fs::read(from.join(name)).unwrap();
    for Row { what, edit, says } in rows {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            fs::copy(from.join(file), dir.path().join(file)).unwrap();
        }
        open(dir.path()).unwrap_or_else(|e| panic!("{name} as it is: {e}"));
        fs::write(dir.path().join(name), edit(&whole)).unwrap();
        let start = Instant::now();
        let e = open(dir.path()).err().unwrap_or_else(|| panic!("{name}, {what}: not refused"));
        let said = e.to_string();
        assert!(said.contains(says), "{name}, {what}: {said}");
        let place = e.place().unwrap_or_default();
        assert!(
            place.contains(name) || place.contains(&*dir.path().to_string_lossy()),
            "{name}, {what}, where: {said}"
        );
        // A message is for people.
        assert!(said.len() < 3000, "{name}, {what}: {} characters", said.len());
        assert!(start.elapsed() < Duration::from_secs(5), "{name}, {what}: {:?}", start.elapsed());
    }
}

fn tiny() -> PathBuf {
    golden("tiny/tiny-mistral/base")
}

const MODEL: [&str; 3] = ["config.json", "generation_config.json", "model.safetensors"];

fn open_base(dir: &Path) -> Outcome {
    Base::from_dir(dir).map(|_| ())
}

#[test]
fn config_json() {
    let mut rows = any_json();
    rows.extend([
        row("a key twice", "given twice", |b| {
            String::from_utf8(b.to_vec()).unwrap().replacen('{', "{\"hidden_size\": 64,", 1).into()
        }),
        swap("hidden_size as text", "hidden_size", "\"hidden_size\": 64", "\"hidden_size\": \"64\""),
        swap("hidden_size negative", "hidden_size", "\"hidden_size\": 64", "\"hidden_size\": -64"),
        swap("hidden_size zero", "hidden_size", "\"hidden_size\": 64", "\"hidden_size\": 0"),
        swap("hidden_size with a fraction", "hidden_size", "\"hidden_size\": 64", "\"hidden_size\": 64.5"),
        swap("hidden_size beyond u64", "hidden_size", "\"hidden_size\": 64", "\"hidden_size\": 1e300"),
        swap("hidden_size that does not fit the weights", "shape", "\"hidden_size\": 64", "\"hidden_size\": 128"),
        swap("a billion layers", "num_hidden_layers", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000"),
        swap("more layers than weights", "lacks a tensor", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"),
        swap(
            "heads that do not divide",
            "num_key_value_heads",
            "\"num_key_value_heads\": 2",
            "\"num_key_value_heads\": 3",
        ),
        swap("no hidden_size", "hidden_size", "\"hidden_size\"", "\"hidden_sise\""),
        swap("an unknown family", "model_type", "\"model_type\": \"mistral\"", "\"model_type\": \"mystery\""),
        swap("NaN", "", "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": NaN"),
        swap("rms_norm_eps negative", "rms_norm_eps", "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": -1"),
    ]);
    table(&tiny(), &MODEL, "config.json", rows, &open_base);
}

#[test]
fn generation_config_json() {
    let mut rows = any_json();
    rows.push(row("eos_token_id as text", "eos_token_id", |_| b"{\"eos_token_id\": \"2\"}".to_vec()));
    table(&tiny(), &MODEL, "generation_config.json", rows, &open_base);
}

/// The header's JSON edited, its length corrected.
fn header(what: &'static str, says: &'static str, edit: impl Fn(Value) -> String + 'static) -> Row {
    row(what, says, move |bytes| {
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json = edit(serde_json::from_slice(&bytes[8..8 + n]).unwrap());
        [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &bytes[8 + n..]].concat()
    })
}

/// A field of one tensor's entry.
fn entry(what: &'static str, says: &'static str, field: &'static str, value: Value) -> Row {
    header(what, says, move |mut json| {
        json["model.norm.weight"][field] = value.clone();
        json.to_string()
    })
}

#[test]
fn model_safetensors() {
    let rows = vec![
        text("empty", "too short", ""),
        text("seven bytes", "too short", [0; 7]),
        half("cut in half", "beyond the end"),
        row("one byte short", "beyond the end", |b| b[..b.len() - 1].to_vec()),
        row("one byte more", "longer than its tensors", |b| [b, b"x"].concat()),
        row("a header of 2^64 bytes", "length of the safetensors header", |b| {
            [&u64::MAX.to_le_bytes(), &b[8..]].concat()
        }),
        row("a header longer than the file", "length of the safetensors header", |b| {
            [&(b.len() as u64).to_le_bytes(), &b[8..]].concat()
        }),
        row("a header cut short", "header is not valid", |b| [&100u64.to_le_bytes(), &b[8..]].concat()),
        row("a header that is not UTF-8", "header is not valid", |b| {
            let mut b = b.to_vec();
            b[12] = 0xff;
            b
        }),
        header("a header of depth 100,000", "header is not valid", |_| format!("{{\"a\": {}", "[".repeat(100_000))),
        header("a tensor twice", "names a tensor twice", |json| {
            let entry = json["model.norm.weight"].to_string();
            json.to_string().replacen('{', &format!("{{\"model.norm.weight\": {entry},"), 1)
        }),
        header("metadata that is a number", "metadata is not text", |mut json| {
            json["__metadata__"] = json!({"format": 1});
            json.to_string()
        }),
        entry("a shape that is no list", "not valid", "shape", json!(64)),
        entry("a negative shape", "not valid", "shape", json!([-64])),
        entry("a shape beyond u64", "cannot be right", "shape", json!([1u64 << 40, 1u64 << 40])),
        entry("a shape of other size", "does not match its bytes", "shape", json!([65])),
        entry("a dtype that is a number", "not valid", "dtype", json!(3)),
        entry("a dtype of other size", "does not match its bytes", "dtype", json!("F64")),
        entry("offsets in the wrong order", "ends before it starts", "data_offsets", json!([100, 50])),
        entry("offsets beyond the file", "beyond the end", "data_offsets", json!([0, 1u64 << 60])),
        entry("offsets over another tensor", "overlap", "data_offsets", json!([0, 256])),
        entry("offsets that are text", "not valid", "data_offsets", json!(["0", "256"])),
        header("no tensors", "longer than its tensors", |_| "{}".into()),
        header("a tensor missing at the beginning", "belong to no tensor", |mut json| {
            let tensors = json.as_object_mut().unwrap();
            tensors.retain(|_, t| t["data_offsets"][0] != json!(0));
            json.to_string()
        }),
    ];
    table(&tiny(), &MODEL, "model.safetensors", rows, &open_base);
}

/// The tiny model in two shards with an index.
fn sharded() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(tiny().join("config.json"), dir.path().join("config.json")).unwrap();
    let from = Checkpoint::open(tiny()).unwrap();
    let headers: Vec<_> = from
        .names_in_file_order()
        .into_iter()
        .map(|n| {
            let i = from.info(&n).unwrap();
            tunebook::model::TensorHeader::new(n, i.dtype, i.shape)
        })
        .collect();
    let metadata = tunebook::model::pt_metadata();
    let mut w =
        tunebook::model::ShardedWriter::create(dir.path(), headers.clone(), from.bytes() / 2, &metadata).unwrap();
    for h in headers {
        w.write(&h.name, &from.read_bytes(&h.name).unwrap()).unwrap();
    }
    w.finish().unwrap();
    dir
}

#[test]
fn model_safetensors_index_json() {
    let dir = sharded();
    let files: Vec<String> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let shard = files.iter().find(|f| f.starts_with("model-00001")).unwrap().to_string();
    let to = |what, says, name: &'static str| {
        let shard = shard.clone();
        row(what, says, move |b| String::from_utf8(b.to_vec()).unwrap().replacen(&shard, name, 1).into())
    };
    let mut rows = any_json();
    rows.extend([
        to("a path upwards", "elsewhere", "../model.safetensors"),
        to("an absolute path", "elsewhere", "/etc/passwd"),
        to("a path through a directory", "elsewhere", "x/../../model.safetensors"),
        to("a backslash", "elsewhere", "..\\\\model.safetensors"),
        to("the directory itself", "elsewhere", ".."),
        to("no name", "elsewhere", ""),
        to("a shard that is not there", "missing", "model-00009-of-00009.safetensors"),
        to("a zero byte", "", "a\\u0000b"),
        text("a map of numbers", "not valid", r#"{"weight_map": {"a": 1}}"#),
        text("no map", "not valid", r#"{"metadata": {}}"#),
        swap("a tensor twice", "given twice", "\"weight_map\": {", "\"weight_map\": {\n\"model.norm.weight\": \"x\","),
        swap("a tensor that is in no shard", "do not agree", "model.norm.weight", "model.norm.wait"),
    ]);
    table(dir.path(), &files, "model.safetensors.index.json", rows, &open_base);
}

#[test]
fn links_out_of_the_model_directory_are_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    for file in MODEL {
        fs::copy(tiny().join(file), model.join(file)).unwrap();
    }
    let secret = dir.path().join("secret");
    fs::write(&secret, "private").unwrap();
    std::os::unix::fs::symlink(&secret, model.join("tokenizer.json")).unwrap();
    let merge = |out: &str| {
        let adapter = golden("tiny/tiny-mistral/peft/qv_r8");
        tunebook::lora::merge(&model, adapter)?.onto(tunebook::lora::MergeBase::Original).save(dir.path().join(out))
    };
    let e = merge("out").map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("leads out") && e.contains("tokenizer.json") && e.contains("secret"), "{e}");
    assert!(!dir.path().join("out").exists());
    // Within the directory, and within the hub's cache, links are what they are for.
    fs::remove_file(model.join("tokenizer.json")).unwrap();
    fs::write(model.join("real.json"), "{}").unwrap();
    std::os::unix::fs::symlink("real.json", model.join("tokenizer.json")).unwrap();
    merge("out").unwrap();
    assert!(!dir.path().join("out/tokenizer.json").is_symlink());
    let cache = dir.path().join("models--a--b");
    fs::create_dir_all(cache.join("blobs")).unwrap();
    fs::create_dir_all(cache.join("snapshots/abc")).unwrap();
    for file in MODEL {
        fs::copy(tiny().join(file), cache.join("blobs").join(file)).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{file}"), cache.join("snapshots/abc").join(file)).unwrap();
    }
    let merged = tunebook::lora::merge(cache.join("snapshots/abc"), golden("tiny/tiny-mistral/peft/qv_r8")).unwrap();
    merged.onto(tunebook::lora::MergeBase::Original).save(dir.path().join("from cache")).unwrap();
}

#[test]
fn a_file_that_is_a_directory_a_loop_or_gone() {
    for make in [
        (|p: &Path| fs::create_dir(p).unwrap()) as fn(&Path),
        |p| std::os::unix::fs::symlink(p, p).unwrap(),
        |p| std::os::unix::fs::symlink("/nonexistent", p).unwrap(),
        |_| {},
    ] {
        for name in ["config.json", "model.safetensors"] {
            let dir = tempfile::tempdir().unwrap();
            for file in MODEL.iter().filter(|f| **f != name) {
                fs::copy(tiny().join(file), dir.path().join(file)).unwrap();
            }
            make(&dir.path().join(name));
            let e = Base::from_dir(dir.path()).unwrap_err();
            assert!(e.place().is_some() && e.next_step().is_some(), "{name}: {e}");
        }
    }
}

#[test]
fn weights_that_are_not_numbers() {
    let dir = tempfile::tempdir().unwrap();
    for file in MODEL {
        fs::copy(tiny().join(file), dir.path().join(file)).unwrap();
    }
    let info = Checkpoint::open(dir.path()).unwrap().info("model.layers.1.mlp.down_proj.weight").unwrap();
    for value in [f32::NAN, f32::INFINITY] {
        let mut bytes = fs::read(&info.file).unwrap();
        let at = info.offset as usize + 4 * 77;
        match info.dtype.size_in_bytes() {
            4 => bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()),
            _ => bytes[at..at + 2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
        }
        fs::write(&info.file, bytes).unwrap();
        let base = Base::from_dir(dir.path()).unwrap();
        let e =
            tunebook::model::write_bnb_4bit(&base, dir.path().join("q"), Default::default()).unwrap_err().to_string();
        assert!(e.contains("not finite") && e.contains("model.layers.1.mlp.down_proj"), "{e}");
        assert!(!dir.path().join("q").exists());
    }
}

#[test]
fn adapter_config_json() {
    let from = golden("tiny/tiny-mistral/peft/qv_r8");
    let open = |dir: &Path| Adapter::load(dir)?.check(&ModelSpec::from_dir(tiny())?);
    let mut rows = any_json();
    rows.extend([
        row("a key twice", "given twice", |b| {
            String::from_utf8(b.to_vec()).unwrap().replacen('{', "{\"r\": 8,", 1).into()
        }),
        swap("r as text", "r", "\"r\": 8", "\"r\": \"8\""),
        swap("r zero", "r", "\"r\": 8", "\"r\": 0"),
        swap("r negative", "r", "\"r\": 8", "\"r\": -8"),
        swap("r that is not the tensors'", "rank", "\"r\": 8", "\"r\": 4"),
        swap("r beyond all", "", "\"r\": 8", "\"r\": 18446744073709551615"),
        swap("another method", "LoRA", "\"peft_type\": \"LORA\"", "\"peft_type\": \"IA3\""),
        swap("no method", "LoRA", "\"peft_type\"", "\"peft_tipe\""),
        swap("lora_alpha as a list", "lora_alpha", "\"lora_alpha\": 16", "\"lora_alpha\": [16]"),
        swap("lora_alpha zero", "lora_alpha", "\"lora_alpha\": 16", "\"lora_alpha\": 0"),
    ]);
    table(&from, &["adapter_config.json", "adapter_model.safetensors"], "adapter_config.json", rows, &open);
}

#[test]
fn adapter_model_safetensors() {
    let from = golden("tiny/tiny-mistral/peft/qv_r8");
    let open = |dir: &Path| Adapter::load(dir)?.check(&ModelSpec::from_dir(tiny())?).map_err(|e| e.at_path(dir));
    let rows = vec![
        text("empty", "too short", ""),
        half("cut in half", "beyond the end"),
        row("one byte more", "longer", |b| [b, b"x"].concat()),
        header("a pair torn apart", "not supported", |json| json.to_string().replacen("lora_B", "lora_C", 1)),
        header("a module that is not there", "another model", |json| {
            json.to_string().replace("layers.1.", "layers.7.")
        }),
    ];
    table(&from, &["adapter_config.json", "adapter_model.safetensors"], "adapter_model.safetensors", rows, &open);
}

/// A tokenizer's directory.
fn tokenizer_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer_json()).unwrap();
    let config =
        json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": crate::tiny_tokenizer::CHAT_TEMPLATE});
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

#[test]
fn tokenizer_json_and_its_config() {
    let dir = tokenizer_dir();
    let files = ["tokenizer.json", "tokenizer_config.json"];
    // To where a text is encoded: some damage is met only then.
    let open = |dir: &Path| {
        let t = Tokenizer::from_dir(dir)?;
        let template = ChatTemplate::from_tokenizer(&t).map_err(|e| e.at_path(dir))?;
        let text =
            template.render(&[message("user", "the cat")], &ChatOptions::prompt()).map_err(|e| e.at_path(dir))?;
        t.encode(&text).map_err(|e| e.at_path(dir)).map(|_| ())
    };
    let mut rows = any_json();
    rows.extend([
        swap("a model of no known type", "", "\"type\":\"BPE\"", "\"type\":\"EPB\""),
        swap("a merge of unknown tokens", "", "t h\"", "q1 q2\""),
        swap("a vocabulary of text", "", "\"<unk>\":0", "\"<unk>\":\"0\""),
        swap("an added token with a negative id", "", "\"id\":0", "\"id\":-1"),
        swap("no model", "", "\"model\":", "\"modell\":"),
        swap("a decoder of no known type", "", "\"type\":\"ByteFallback\"", "\"type\":\"BiteFallback\""),
        swap("a normalizer without a pattern", "", "\"pattern\":", "\"patern\":"),
    ]);
    table(dir.path(), &files, "tokenizer.json", rows, &open);
    let mut rows = any_json();
    rows.extend([
        text("a key twice", "given twice", r#"{"bos_token": "<s>", "bos_token": "</s>"}"#),
        text("eos that is no token", "`<eos>`", r#"{"eos_token": "<eos>"}"#),
        text("a template that is a number", "unknown form", r#"{"chat_template": 3}"#),
        text("templates without names", "unknown form", r#"{"chat_template": [{"template": "a"}]}"#),
        text("no template", "no chat template", r#"{"eos_token": "</s>"}"#),
        text("a template that is no Jinja", "chat template", r#"{"chat_template": "{% if %}"}"#),
    ]);
    table(dir.path(), &files, "tokenizer_config.json", rows, &open);
}

#[test]
fn hostile_templates() {
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000));
    let blocks = format!("{}{}", "{% if true %}".repeat(5000), "{% endif %}".repeat(5000));
    for (what, source, says) in [
        ("loops for ever", "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "fuel"),
        ("loops over a huge range", "{% for i in range(1000000000000) %}{% endfor %}", ""),
        (
            "writes without end",
            "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
            "fuel",
        ),
        ("a gigantic string", "{{ 'x' * 100000000000 }}", "fuel"),
        (
            "a string that doubles",
            "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "fuel",
        ),
        ("calls itself for ever", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("includes a file", "{% include '/etc/passwd' %}", "cannot use other files"),
        ("imports a file", "{% import '/etc/passwd' as x %}{{ x }}", "cannot use other files"),
        ("from a file", "{% from '../secret' import x %}{{ x }}", "cannot use other files"),
        ("extends a file", "{% extends 'base.html' %}", "cannot use other files"),
        ("includes itself", "{% include 'chat' %}", "include"),
        ("Python's back doors", "{{ ''.__class__.__mro__ }}", ""),
        ("an unknown filter", "{{ 1|open }}", ""),
        ("an unknown function", "{{ open('/etc/passwd') }}", ""),
        ("parentheses 5,000 deep", deep.as_str(), ""),
        ("blocks 5,000 deep", blocks.as_str(), ""),
        ("division by zero", "{{ 1 // 0 }}", ""),
        ("tojson of a wide indent", "{{ messages|tojson(indent=1000000000000) }}", ""),
        ("a time that cannot be written", "{{ strftime_now('%Y' * 100000) }}", ""),
    ] {
        let start = Instant::now();
        // On a small stack, as the threads that rows are rendered on have.
        let source = source.to_owned();
        let run = move || {
            ChatTemplate::new(&source, Some("<s>"), None)?.render(&[message("user", "hi")], &ChatOptions::default())
        };
        let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap();
        match thread.join().unwrap() {
            Ok(text) => assert!(says.is_empty() && text.len() < 10_000_000, "{what}: {} bytes", text.len()),
            Err(e) => assert!(e.to_string().contains(says), "{what}: {e}"),
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{what}: {:?}", start.elapsed());
    }
}

/// Reads all rows, and looks at the file.
fn open_rows(dir: &Path, name: &str) -> Outcome {
    RowFile::open(dir.join(name))?.read().map(|_| ())
}

#[test]
fn files_of_rows() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    put("rows.jsonl", "{\"a\": 1}\n{\"a\": 2}\n");
    put("rows.json", "[{\"a\": 1}, {\"a\": 2}]");
    put("rows.csv", "a,b\n1,2\n3,4\n");
    let mut rows: Vec<Row> = any_json().into_iter().filter(|r| r.what != "cut in half").collect();
    rows.extend([
        text("a line cut short", ":2", "{\"a\": 1}\n{\"a\":"),
        text("a key twice", "given twice", "{\"a\": 1, \"a\": 2}\n"),
        text("blank lines alone", "no rows", "\n\n  \n"),
        text("two objects in a line", ":1", "{\"a\": 1} {\"a\": 2}\n"),
    ]);
    table(dir.path(), &["rows.jsonl"], "rows.jsonl", rows, &|d| open_rows(d, "rows.jsonl"));
    let mut rows = any_json();
    rows.extend([
        text("an empty list", "no rows", "[]"),
        text("a row that is no object", "row 2", "[{\"a\": 1}, 2]"),
        text("a key twice", "given twice", "[{\"a\": 1, \"a\": 2}]"),
        text("two lists", "one list", "{\"a\": [{\"x\": 1}], \"b\": [{\"y\": 1}]}"),
        text("JSONL", "must be named .jsonl", "{\"a\": 1}\n{\"a\": 2}\n"),
    ]);
    table(dir.path(), &["rows.json"], "rows.json", rows, &|d| open_rows(d, "rows.json"));
    let rows = vec![
        text("empty", "no rows", ""),
        text("a header alone", "no rows", "a,b\n"),
        text("a field too many", ":3", "a,b\n1,2\n3,4,5\n"),
        text("a field too few", ":3", "a,b\n1,2\n3\n"),
        text("a name twice", "same name", "a,b,a\n1,2,3\n"),
        text("not UTF-8", "UTF-8", b"a,b\n1,\xff\n"),
        text("a quote without its partner", "", "a,b\n1,2\n\"3,4\n"),
    ];
    table(dir.path(), &["rows.csv"], "rows.csv", rows, &|d| open_rows(d, "rows.csv"));
}

#[cfg(feature = "polars")]
#[test]
fn parquet_files() {
    let Some(from) = crate::support::shared("real/data") else { return };
    let name = "dolly_100_zstd.parquet";
    let open = |dir: &Path| open_rows(dir, name);
    let rows = vec![
        text("empty", "Parquet", ""),
        half("cut in half", "Parquet"),
        row("one byte short", "Parquet", |b| b[..b.len() - 1].to_vec()),
        text("text", "Parquet", "PAR1 but not more PAR1"),
        row("a footer of 4 GB", "Parquet", |b| {
            let mut b = b.to_vec();
            let n = b.len();
            b[n - 8..n - 4].copy_from_slice(&u32::MAX.to_le_bytes());
            b
        }),
        row("zeros in the footer", "Parquet", |b| {
            let mut b = b.to_vec();
            let n = b.len();
            b[n - 200..n - 8].fill(0);
            b
        }),
    ];
    table(&from, &[name], name, rows, &open);
    // Flipped bits may change values that have no checksum, and never more than that.
    let whole = fs::read(from.join(name)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let n = whole.len();
    for at in (0..n - 2000).step_by(n / 40).chain((n - 2000..n).step_by(25)) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(dir.path().join(name), bytes).unwrap();
        if let Err(e) = open(dir.path()) {
            assert!(e.place().unwrap().contains(name), "{e}");
        }
    }
}

#[test]
fn extreme_rows() {
    let t = tiny_tokenizer();
    // A megabyte in one row.
    let big = "the cat ".repeat(1 << 17);
    let rows = Rows::from_values(vec![json!({ "text": big })]).unwrap();
    let ds = encode(&rows, &t, &DataConfig::text("text").max_length(64)).unwrap();
    assert_eq!((ds.max_len(), ds.report().unwrap().truncated.len()), (64, 1));
    assert!(ds.report().unwrap().truncated_tokens > 100_000);
    assert!(format!("{rows:?}").len() < 1000 && rows.to_string().len() < 2000);
    // One token, and none.
    let one = Rows::from_values(vec![json!({"text": "the"})]).unwrap();
    let no_eos = DataConfig::text("text").add_eos(false);
    assert_eq!(encode(&one, &t, &no_eos).unwrap().get(0).trained_tokens(), 1);
    let bare = Tokenizer::from_json(&tokenizer_json(), Some(r#"{"add_bos_token": false}"#)).unwrap();
    let e = encode(&one, &bare, &no_eos).unwrap_err().to_string();
    assert!(e.contains("no row is left") && e.contains("nothing to train on"), "{e}");
    // Every kind of character.
    let text: String = (0..0x3000).filter_map(char::from_u32).collect();
    let odd = Rows::from_values(vec![json!({"text": text}), json!({"text": "\u{FDD0}\u{FDD1}\u{0}\u{FEFF}"})]).unwrap();
    assert_eq!(encode(&odd, &t, &DataConfig::text("text")).unwrap().len(), 2);
    let chat = ChatTemplate::from_tokenizer(&t).unwrap();
    let e = chat.render(&[message("user", "\u{FDD0}")], &ChatOptions::default()).unwrap_err().to_string();
    assert!(e.contains("U+FDD0"), "{e}");
    // A conversation of ten thousand turns.
    let many: Vec<Value> = (0..10_000).map(|i| message(["user", "assistant"][i % 2], "the")).collect();
    assert!(chat.render(&many, &ChatOptions::default()).unwrap().len() > 100_000);
}

#[test]
fn files_of_a_run() {
    let whole = tempfile::tempdir().unwrap();
    let run = crate::checkpoint::new_run(&whole.path().join("run"));
    crate::checkpoint::save(&run, 1, None).unwrap();
    let (dir, checkpoint) = (whole.path().join("run"), whole.path().join("run/checkpoints/step-1"));
    let read = |d: &Path| tunebook::train::RunRecord::read(d).map(|_| ());
    let mut rows = any_json();
    rows.extend([
        swap("another version", "another format", "\"format_version\": 1", "\"format_version\": 2"),
        row("another learning rate", "damaged or was edited", |b| {
            let mut b = b.to_vec();
            let key = b.windows(13).position(|w| w == b"learning_rate").unwrap() + 13;
            let digit = key + b[key..].iter().position(u8::is_ascii_digit).unwrap();
            b[digit] ^= 1;
            b
        }),
        row("no checksum", "damaged or was edited", |b| {
            let lines = String::from_utf8(b.to_vec()).unwrap();
            lines.split_inclusive('\n').filter(|l| !l.contains("sha256")).collect::<String>().into()
        }),
    ]);
    table(&dir, &["run.json"], "run.json", rows, &read);
    let files = crate::checkpoint::listing(&checkpoint);
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    // In a directory of that name the manifest is read; elsewhere its step has nothing to be compared with.
    let open = |d: &Path| tunebook::train::CheckpointDir::open(d)?.verify();
    for name in &files {
        let mut rows = any_json();
        rows.push(row("one byte more", "", |b| [b, b" x"].concat()));
        table(&checkpoint, &files, name, rows, &open);
    }
}
