//! Run directories, checkpoints and metrics: whole or absent, whatever stops the writer.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use serde_json::json;
use tempfile::TempDir;
use tunebook::data::{Dataset, Example};
use tunebook::model::ModelSpec;
use tunebook::train::{
    BaseRecord, CheckpointDir, DatasetRecord, EvalReport, Metrics, MetricsLog, RngState, RunDir, RunRecord, StepReport,
    TensorSlice, TrainConfig, TrainState, clean_leftovers, fingerprint_dir, latest_checkpoint, load_dataset,
    save_dataset, scan_checkpoints, write_checkpoint,
};

use crate::kill_resume::{child_dir, kill_child_after, run_child, spawn_child};
use crate::support::golden;

const N: usize = 5000;

pub fn record() -> RunRecord {
    let spec = ModelSpec::from_dir(golden("tiny/tiny-mistral/base")).unwrap();
    let base = BaseRecord { dir: "models/tiny".into(), fingerprint: "ab".into() };
    let dataset = DatasetRecord { fingerprint: "cd".into(), examples: 3 };
    let train = TrainConfig::default().learning_rate(1.7026900316098216e-5);
    RunRecord::new(spec, json!({"r": 8, "lora_alpha": 16.1}), train, json!({"max_seq_len": 48}), base, dataset)
}

pub fn new_run(at: &Path) -> RunDir {
    let run = RunDir::create(at).unwrap();
    run.commit(&record()).unwrap();
    run
}

fn state(step: u64) -> TrainState {
    TrainState {
        step,
        total_tokens: step * 100,
        rng: RngState { seed: 42, micro_steps: step * 2 },
        ..TrainState::default()
    }
}

/// Saves a checkpoint whose every byte depends on the step.
pub fn save(run: &RunDir, step: u64, limit: Option<usize>) -> tunebook::Result<CheckpointDir> {
    let exp_avg: Vec<f32> = (0..N).map(|i| (step * 7919 + i as u64) as f32 / 3.0).collect();
    let codes: Vec<u8> = (0..N).map(|i| (step + i as u64) as u8).collect();
    let tensors = [TensorSlice::f32("exp_avg", &[5, N / 5], &exp_avg), TensorSlice::u8("state1", &[N], &codes)];
    write_checkpoint(run, &state(step), &tensors, limit, &mut |dir| {
        tunebook::files::write_atomic_bytes(dir.join("adapter_model.safetensors"), &codes)?;
        tunebook::files::write_atomic_bytes(dir.join("adapter_config.json"), b"{}")
    })
}

/// The step of a checkpoint of which everything is as `save` wrote it.
pub fn check(c: &CheckpointDir) -> u64 {
    c.verify().unwrap();
    let step = c.step();
    assert_eq!(c.state().unwrap(), state(step));
    let optimizer = c.optimizer().unwrap();
    assert_eq!(optimizer.names(), ["exp_avg", "state1"]);
    let exp_avg = optimizer.read("exp_avg", Dtype::F32, &[5, N / 5]).unwrap();
    let first = f32::from_le_bytes(exp_avg[..4].try_into().unwrap());
    assert_eq!(first, (step * 7919) as f32 / 3.0);
    let mut codes = vec![0; N];
    optimizer.read_into("state1", Dtype::U8, &[N], &mut codes).unwrap();
    assert!(codes.iter().enumerate().all(|(i, &c)| c == (step + i as u64) as u8));
    assert_eq!(fs::read(c.path().join("adapter_model.safetensors")).unwrap(), codes);
    step
}

pub fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_checkpoint_comes_back_and_old_ones_go() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    assert!(latest_checkpoint(run.path()).unwrap().is_none());
    for step in [5, 10, 100, 20] {
        let saved = save(&run, step, None).unwrap();
        assert_eq!(check(&saved), step);
    }
    // By number, not by text or by date.
    assert_eq!(check(&latest_checkpoint(run.path()).unwrap().unwrap()), 100);
    assert_eq!(scan_checkpoints(run.path()).unwrap().older, [5, 10, 20]);
    save(&run, 101, Some(2)).unwrap();
    assert_eq!(listing(&run.checkpoints()), ["step-100", "step-101"]);
    save(&run, 102, Some(1)).unwrap();
    assert_eq!(listing(&run.checkpoints()), ["step-102"]);
    // Readable by the safetensors crate, with aligned data.
    let bytes = fs::read(run.checkpoints().join("step-102/optimizer.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("exp_avg").unwrap().shape(), [5, N / 5]);
    let manifest = latest_checkpoint(run.path()).unwrap().unwrap().manifest().clone();
    let names: Vec<&str> = manifest.files.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]);
}

#[test]
fn damage_is_found_reported_and_left() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    for step in 1..=6 {
        save(&run, step, None).unwrap();
    }
    let dir = |step: u64| run.checkpoints().join(format!("step-{step}"));
    let flip = |path: PathBuf| {
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    flip(dir(6).join("optimizer.safetensors"));
    fs::remove_file(dir(5).join("manifest.json")).unwrap();
    fs::write(dir(4).join("state.json"), "{").unwrap();
    flip(dir(3).join("adapter_model.safetensors"));
    let scan = scan_checkpoints(run.path()).unwrap();
    assert_eq!(scan.newest.as_ref().map(check), Some(2));
    assert_eq!(scan.older, [1]);
    let problems: Vec<&str> = scan.damaged.iter().map(|d| d.problem.as_str()).collect();
    assert_eq!(problems.len(), 4);
    assert!(problems[0].contains("optimizer.safetensors") && problems[0].contains("SHA-256"), "{}", problems[0]);
    assert!(problems[1].contains("manifest.json"), "{}", problems[1]);
    assert!(problems[2].contains("state.json") && problems[2].contains("1 bytes"), "{}", problems[2]);
    assert!(problems[3].contains("adapter_model.safetensors"), "{}", problems[3]);

    // Training again reaches step 3: the damaged one steps aside and is kept; nothing whole is lost to it.
    save(&run, 3, Some(1)).unwrap();
    assert_eq!(check(&CheckpointDir::open(dir(3)).unwrap()), 3);
    assert_eq!(listing(&run.checkpoints()), ["step-3", "step-3.damaged-1", "step-4", "step-5", "step-6"]);
    // A whole one of the same step is replaced.
    save(&run, 3, Some(1)).unwrap();
    assert_eq!(listing(&run.checkpoints()), ["step-3", "step-3.damaged-1", "step-4", "step-5", "step-6"]);
    assert_eq!(scan_checkpoints(run.path()).unwrap().newest.as_ref().map(check), Some(3));
}

#[test]
fn lying_manifests_are_refused() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    let saved = save(&run, 1, None).unwrap();
    let path = saved.path().join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let cases = [
        (text.replace("\"format_version\": 1", "\"format_version\": 2"), "format version 2"),
        (text.replace("\"step\": 1", "\"step\": 7"), "manifest of step 7"),
        (text.replace("state.json", "../run.json"), "state.json in the manifest"),
        (text.replace("adapter_config.json", "../../run.json"), "`../../run.json` in the manifest"),
        ("[]".into(), "no format_version"),
        (String::new(), "EOF"),
    ];
    for (lie, found) in cases {
        assert_ne!(lie, text);
        fs::write(&path, lie).unwrap();
        let e = CheckpointDir::open(saved.path()).unwrap_err().to_string();
        assert!(e.contains(found), "{e}");
        assert!(latest_checkpoint(run.path()).unwrap().is_none());
    }
}

#[test]
fn tensors_are_checked_against_what_is_expected() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    let optimizer = save(&run, 1, None).unwrap().optimizer().unwrap();
    let wrong_shape = optimizer.read("exp_avg", Dtype::F32, &[N]).unwrap_err().to_string();
    assert!(wrong_shape.contains("F32 [5000]") && wrong_shape.contains("F32 [5, 1000]"), "{wrong_shape}");
    assert!(optimizer.read("exp_avg", Dtype::U8, &[5, N / 5]).is_err());
    assert!(optimizer.read_into("state1", Dtype::U8, &[N], &mut [0; 3]).is_err());
    assert!(optimizer.read("exp_avg_sq", Dtype::F32, &[N]).unwrap_err().to_string().contains("exp_avg_sq"));
    // A shape that does not fit its bytes is refused before anything is written.
    let wrong = [TensorSlice::u8("x", &[4], &[0; 3])];
    let e = write_checkpoint(&run, &state(2), &wrong, None, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(e.contains("do not fit its shape"), "{e}");
    assert_eq!(listing(&run.checkpoints()), ["step-1"]);
}

#[test]
fn a_failing_adapter_or_directory_harms_nothing() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    save(&run, 1, Some(1)).unwrap();
    let e =
        write_checkpoint(&run, &state(2), &[], Some(1), &mut |_| Err(tunebook::Error::new("no adapter"))).unwrap_err();
    assert_eq!(e.what(), "the checkpoint of step 2 was not written");
    assert!(e.to_string().contains("no adapter"));
    assert_eq!(listing(&run.checkpoints()), ["step-1"]);
    // Something else of that name: root may write everywhere, but nobody makes a directory inside a file.
    fs::write(run.checkpoints().join("step-3"), "in the way").unwrap();
    save(&run, 3, Some(1)).unwrap();
    assert_eq!(listing(&run.checkpoints()), ["step-3", "step-3.damaged-1"]);
    fs::rename(run.checkpoints(), run.path().join("elsewhere")).unwrap();
    fs::write(run.checkpoints(), "no directory").unwrap();
    assert!(save(&run, 4, Some(1)).is_err());
    assert_eq!(check(&CheckpointDir::open(run.path().join("elsewhere/step-3")).unwrap()), 3);
}

/// A disk that is full after a number of bytes, played by the limit on the size of a file.
#[test]
#[ignore = "a child of a_full_disk_leaves_the_older_checkpoints"]
fn child_full_disk() {
    let (run, _) = RunDir::open(child_dir()).unwrap();
    let limit: u64 = std::env::var("FILE_LIMIT").unwrap().parse().unwrap();
    // SAFETY: plain calls that change this process only, which does nothing else.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
    }
    match save(&run, 2, Some(1)) {
        Ok(c) => assert_eq!(check(&c), 2),
        Err(e) => {
            assert_eq!(e.what(), "the checkpoint of step 2 was not written");
            assert_eq!(listing(&run.checkpoints()), ["step-1"]);
            std::process::exit(7);
        }
    }
}

#[test]
fn a_full_disk_leaves_the_older_checkpoints() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    save(&run, 1, Some(1)).unwrap();
    let path = run.path().to_owned();
    drop(run);
    // The files have 2, 5000, about 25200, 250 and 700 bytes: each limit stops at another one.
    for (limit, fails) in [(0, true), (1, true), (4000, true), (8192, true), (25_000, true), (200_000, false)] {
        let (status, text) = run_child("checkpoint::child_full_disk", &path, &[("FILE_LIMIT", &limit.to_string())]);
        assert_eq!(status.code(), Some(if fails { 7 } else { 0 }), "limit {limit}: {text}");
        let step = latest_checkpoint(&path).unwrap().as_ref().map(check);
        assert_eq!(step, Some(if fails { 1 } else { 2 }), "limit {limit}");
    }
}

/// A disk of 150,000 bytes that really fills up, in a mount namespace of the child's own.
#[test]
#[ignore = "a child of a_small_disk_fills_up"]
fn child_small_disk() {
    let disk = std::ffi::CString::new(child_dir().into_os_string().into_encoded_bytes()).unwrap();
    // SAFETY: NUL-terminated strings that live through the calls; the namespace ends with this process.
    let mounted = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                c"none".as_ptr(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
            && libc::mount(c"none".as_ptr(), disk.as_ptr(), c"tmpfs".as_ptr(), 0, c"size=150000".as_ptr().cast()) == 0
    };
    if !mounted {
        std::process::exit(9);
    }
    let run = new_run(&child_dir().join("run"));
    let mut log = MetricsLog::create(&run).unwrap();
    log.append(report(1)).unwrap();
    let (full, e) = (1..).find_map(|step| save(&run, step, None).err().map(|e| (step, e))).unwrap();
    assert!(full > 2, "{e}");
    assert!(e.to_string().contains("free some space"), "{e}");
    assert!(scan_checkpoints(run.path()).unwrap().damaged.is_empty());
    assert_eq!(latest_checkpoint(run.path()).unwrap().as_ref().map(check), Some(full - 1));
    // Metrics on the full disk: the line that does not fit is taken back whole.
    let lines = 1 + (2..).take_while(|&step| log.append(report(step)).is_ok()).count();
    assert_eq!(Metrics::read(run.path()).unwrap().steps.len(), lines);
    assert!(fs::read(run.path().join("metrics.jsonl")).unwrap().ends_with(b"\n"));
    for step in ["step-1", "step-2"] {
        fs::remove_dir_all(run.checkpoints().join(step)).unwrap();
    }
    assert_eq!(check(&save(&run, full, None).unwrap()), full);
    log.append(report(lines as u64 + 1)).unwrap();
    assert_eq!(Metrics::read(run.path()).unwrap().steps.len(), lines + 1);
}

#[test]
fn a_small_disk_fills_up() {
    let tmp = TempDir::new().unwrap();
    let (status, text) = run_child("checkpoint::child_small_disk", tmp.path(), &[]);
    if status.code() == Some(9) {
        eprintln!("skipped: this process may not mount a disk (the limit on file size plays one elsewhere)");
        return;
    }
    assert!(status.success(), "{text}");
}

/// Writes metrics and checkpoints as fast as it can, going on from the last whole one.
#[test]
#[ignore = "a child of killed_writers_leave_whole_checkpoints"]
fn child_writer() {
    let (run, _) = RunDir::open(child_dir()).unwrap();
    fs::write(run.path().join("ready"), "").unwrap();
    clean_leftovers(&run).unwrap();
    let from = latest_checkpoint(run.path()).unwrap().as_ref().map_or(0, check);
    let mut log = MetricsLog::resume(&run, from).unwrap();
    for step in from + 1..=from + 10_000 {
        log.append(report(step)).unwrap();
        save(&run, step, Some(2)).unwrap();
    }
}

#[test]
fn killed_writers_leave_whole_checkpoints() {
    let tmp = TempDir::new().unwrap();
    let path = tmp.path().join("run");
    drop(new_run(&path));
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let (mut reached, mut longest, mut kills) = (0, 60_000, 0);
    while kills < 25 || reached == 0 {
        kills += 1;
        _ = fs::remove_file(path.join("ready"));
        let child = spawn_child("checkpoint::child_writer", &path, &[]);
        let life = Duration::from_micros(rng.random_range(5_000..longest));
        assert!(!kill_child_after(child, &path.join("ready"), life));
        let scan = scan_checkpoints(&path).unwrap();
        assert!(scan.damaged.is_empty(), "{:?}", scan.damaged);
        let step = scan.newest.as_ref().map_or(0, check);
        assert!(step >= reached, "step {step} after {reached}");
        reached = step;
        // A slow disk needs longer lives to get anywhere.
        if reached == 0 && kills > 5 {
            longest *= 2;
        }
        let steps: Vec<u64> = Metrics::read(&path).unwrap().steps.iter().map(|r| r.step).collect();
        assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
        assert!(steps.len() as u64 >= step, "a checkpoint of step {step} with {} lines", steps.len());
    }
    let (run, _) = RunDir::open(&path).unwrap();
    clean_leftovers(&run).unwrap();
    assert!(listing(&run.checkpoints()).iter().all(|name| name.starts_with("step-")));
}

#[test]
fn a_run_comes_back_as_it_was_asked() {
    let tmp = TempDir::new().unwrap();
    let path = tmp.path().join("runs/demo");
    let run = new_run(&path);
    let (_, back) = RunDir::open(&path).unwrap();
    assert_eq!(back, record());
    assert_eq!(back.train.learning_rate.to_bits(), 1.7026900316098216e-5_f64.to_bits());
    // The older value of the run no longer writes.
    let e = save(&run, 1, None).unwrap_err().to_string();
    assert!(e.contains("opened again"), "{e}");
    let e = RunDir::create(&path).unwrap_err();
    assert_eq!(e.what(), "there is already a run here");
    // A creation that was cut short is not a run, and does not block the next.
    let half = tmp.path().join("half");
    drop(RunDir::create(&half).unwrap());
    assert_eq!(RunDir::open(&half).unwrap_err().what(), "there is no run here");
    fs::create_dir(half.join("checkpoints")).unwrap();
    fs::write(half.join("metrics.jsonl"), "").unwrap();
    drop(RunDir::create(&half).unwrap());
    fs::write(half.join("metrics.jsonl"), "{}\n").unwrap();
    assert!(RunDir::create(&half).unwrap_err().to_string().contains("metrics.jsonl"));
    assert!(RunDir::open(tmp.path().join("nowhere")).unwrap_err().to_string().contains("no such directory"));
}

#[test]
fn other_formats_are_refused() {
    let tmp = TempDir::new().unwrap();
    drop(new_run(tmp.path().join("run").as_path()));
    let path = tmp.path().join("run/run.json");
    let text = fs::read_to_string(&path).unwrap();
    let version = |v: &str| text.replacen("\"format_version\": 1", &format!("\"format_version\": {v}"), 1);
    let cases = [
        (version("2"), "found:    format version 2\n  next:     use a newer version of tunebook"),
        (version("0"), "format version 0\n  next:     use the version of tunebook that wrote it"),
        (version("\"1\""), "no format_version"),
        (text.replace("\"spec\"", "\"speck\""), "missing field `spec`"),
        (text[..text.len() / 2].to_owned(), "EOF"),
    ];
    for (changed, found) in cases {
        assert_ne!(changed, text);
        fs::write(&path, changed).unwrap();
        let e = RunDir::open(tmp.path().join("run")).unwrap_err().to_string();
        assert!(e.contains(found) && e.contains("run.json"), "{e}");
    }
}

/// Tries to open a run that its parent holds.
#[test]
#[ignore = "a child of one_process_writes"]
fn child_opens() {
    match RunDir::open(child_dir()) {
        Ok(_) => {}
        Err(e) => {
            assert_eq!(e.what(), "another process has this run open");
            std::process::exit(7);
        }
    }
}

#[test]
fn one_process_writes() {
    let tmp = TempDir::new().unwrap();
    let path = tmp.path().join("run");
    let run = new_run(&path);
    let code = || run_child("checkpoint::child_opens", &path, &[]).0.code();
    assert_eq!(code(), Some(7));
    let (newer, _) = RunDir::open(&path).unwrap();
    drop(run);
    assert_eq!(code(), Some(7));
    newer.check().unwrap();
    drop(newer);
    assert_eq!(code(), Some(0));
}

fn report(step: u64) -> StepReport {
    let x = 1.0 / (step as f64 + 0.1);
    StepReport {
        step,
        epoch: x,
        loss: x * 7.0,
        grad_norm: f64::from(x as f32),
        learning_rate: x * 2e-4,
        tokens: step * 96,
        trained_tokens: step * 50,
        tokens_per_second: x * 1e4,
        seconds: x,
        data_seconds: x / 8.0,
        forward_seconds: x / 3.0,
        backward_seconds: x / 2.0,
        optimizer_seconds: x / 100.0,
        arena_bytes: 1 << 33,
        clipped: step.is_multiple_of(2),
        resumed: false,
    }
}

#[test]
fn metrics_are_cut_at_the_checkpoint() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    let mut log = MetricsLog::create(&run).unwrap();
    for step in 1..=200 {
        assert_eq!(log.append(report(step)).unwrap(), report(step));
    }
    let evaluation =
        |step| EvalReport { step, loss: 0.1 + step as f64, examples: 3, tokens: 4, trained_tokens: 2, seconds: 0.3 };
    for step in [50, 100, 150] {
        log.append_evaluation(&evaluation(step)).unwrap();
    }
    let file = run.path().join("metrics.jsonl");
    let back = Metrics::read(run.path()).unwrap();
    assert_eq!(back.steps, (1..=200).map(report).collect::<Vec<_>>());
    assert_eq!(back.evaluations, [50, 100, 150].map(evaluation));
    assert!(back.resumes().is_empty());

    // A line that was cut short is left out, and goes when the run continues.
    let mut text = fs::read(&file).unwrap();
    text.truncate(text.len() - 9);
    fs::write(&file, &text).unwrap();
    assert_eq!(Metrics::read(run.path()).unwrap().steps.len(), 199);
    let (run, _) = RunDir::open(run.path()).unwrap();
    assert!(log.append(report(200)).is_err(), "the older log must not write");
    let mut log = MetricsLog::resume(&run, 120).unwrap();
    assert!(log.append(report(121)).unwrap().resumed);
    assert!(!log.append(report(122)).unwrap().resumed);
    let back = Metrics::read(run.path()).unwrap();
    assert_eq!(back.steps.iter().map(|r| r.step).collect::<Vec<_>>(), (1..=122).collect::<Vec<_>>());
    assert_eq!(back.evaluations, [50, 100].map(evaluation));
    assert_eq!(back.resumes(), [120]);

    // Damage before the end is not passed over.
    let text = fs::read_to_string(&file).unwrap().replacen("\"step\":7,", "\"step\":,", 1);
    fs::write(&file, text).unwrap();
    let e = Metrics::read(run.path()).unwrap_err().to_string();
    assert!(e.contains("metrics.jsonl: line 7"), "{e}");
    assert!(MetricsLog::resume(&run, 120).is_err());
    // It is harmless where it is cut off.
    drop(MetricsLog::resume(&run, 5).unwrap());
    assert_eq!(Metrics::read(run.path()).unwrap().steps.len(), 5);
}

#[test]
fn losses_that_are_no_numbers_are_kept() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    let mut log = MetricsLog::create(&run).unwrap();
    let odd =
        StepReport { loss: f64::NAN, grad_norm: f64::INFINITY, epoch: f64::NEG_INFINITY, seconds: -0.0, ..report(1) };
    log.append(odd).unwrap();
    let back = &Metrics::read(run.path()).unwrap().steps[0];
    assert!(back.loss.is_nan());
    assert_eq!((back.grad_norm, back.epoch), (f64::INFINITY, f64::NEG_INFINITY));
    assert_eq!(back.seconds.to_bits(), (-0.0_f64).to_bits());
}

#[cfg(feature = "polars")]
#[test]
fn metrics_become_a_table() {
    let reports: Vec<StepReport> = (1..=3).map(report).collect();
    let frame = tunebook::train::metrics_frame(&reports).unwrap();
    assert_eq!(frame.shape(), (3, 16));
    let fields = serde_json::to_value(&reports[0]).unwrap();
    let names: Vec<&str> = frame.get_column_names().iter().map(|n| n.as_str()).collect();
    assert_eq!(names, fields.as_object().unwrap().keys().collect::<Vec<_>>());
    let loss: Vec<Option<f64>> = frame.column("loss").unwrap().f64().unwrap().iter().collect();
    assert_eq!(loss, reports.iter().map(|r| Some(r.loss)).collect::<Vec<_>>());
    let tokens: Vec<Option<u64>> = frame.column("tokens").unwrap().u64().unwrap().iter().collect();
    assert_eq!(tokens, [Some(96), Some(192), Some(288)]);
    assert_eq!(tunebook::train::metrics_frame(&[]).unwrap().shape(), (0, 16));
}

#[test]
fn the_data_set_stays_with_the_run() {
    let tmp = TempDir::new().unwrap();
    let path = tmp.path().join("dataset.safetensors");
    let examples: Vec<Example> = (1..=9).map(|n| Example::completion_only((0..n * 3).collect(), n as usize)).collect();
    let dataset = Dataset::new(examples).unwrap();
    save_dataset(&path, &dataset).unwrap();
    let back = load_dataset(&path).unwrap();
    assert_eq!(back.examples(), dataset.examples());
    assert_eq!(back.fingerprint(), dataset.fingerprint());
    assert_eq!(listing(tmp.path()), ["dataset.safetensors"]);
    DatasetRecord::of(&dataset).check(&back).unwrap();
    let (fewer, _) = dataset.split_at(8).unwrap();
    assert!(DatasetRecord::of(&dataset).check(&fewer).unwrap_err().to_string().contains("8 examples"));
    let bytes = fs::read(&path).unwrap();
    for cut in [0, 7, 20, bytes.len() - 1] {
        fs::write(&path, &bytes[..cut]).unwrap();
        assert!(load_dataset(&path).is_err());
    }
    // Lengths that say more than there is: the first is at the start of the data.
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut lie = bytes.clone();
    lie[8 + header..16 + header].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, lie).unwrap();
    assert!(load_dataset(&path).unwrap_err().to_string().contains("lengths beyond the tokens"));
    fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
    assert!(load_dataset(&path).unwrap_err().to_string().contains("18446744073709551615 bytes"));
}

#[test]
fn a_base_is_known_by_its_fingerprint() {
    let tmp = TempDir::new().unwrap();
    assert!(fingerprint_dir(tmp.path()).is_err());
    fs::write(tmp.path().join("config.json"), "{}").unwrap();
    let big = tmp.path().join("model.safetensors");
    let file = fs::File::create(&big).unwrap();
    file.set_len(200 << 20).unwrap();
    let before = fingerprint_dir(tmp.path()).unwrap();
    let record = BaseRecord::of(tmp.path()).unwrap();
    record.check().unwrap();
    assert_eq!(before.len(), 64);
    fs::write(tmp.path().join("README.md"), "not part of the model").unwrap();
    assert_eq!(fingerprint_dir(tmp.path()).unwrap(), before);
    // The last byte, and the size.
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], (200 << 20) - 1).unwrap();
    let changed = fingerprint_dir(tmp.path()).unwrap();
    file.set_len((200 << 20) - 1).unwrap();
    let shorter = fingerprint_dir(tmp.path()).unwrap();
    assert!(before != changed && changed != shorter && before != shorter);
    assert!(record.check().unwrap_err().to_string().contains(&shorter));
    assert!(BaseRecord::of(tmp.path().join("nowhere")).is_err());
}
