//! Runs that are killed (SIGKILL) at random instants and resumed end as if nothing had happened, bit for bit.
//!
//! The children are this test binary itself, filtered to one ignored test.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;
use tunebook::data::{Dataset, Example};
use tunebook::model::Base;
use tunebook::plan::MemoryPlan;
use tunebook::train::{CheckpointDir, LrScheduler, Metrics, Optim, Run, StepReport, TrainConfig};

use crate::support::golden;

/// Starts `test` (its full name in this binary, an ignored test) in a process of its own, with `TUNEBOOK_CHILD` set to `dir`.
pub fn spawn_child(test: &str, dir: &Path, env: &[(&str, &str)]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
    command.env("TUNEBOOK_CHILD", dir).envs(env.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Runs a child to its end; its exit status and what it printed.
pub fn run_child(test: &str, dir: &Path, env: &[(&str, &str)]) -> (ExitStatus, String) {
    let output = spawn_child(test, dir, env).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status, text)
}

/// Lets a child live for `life` from the moment at which `ready` exists, then kills it (SIGKILL). Whether it had already
/// ended by itself; a child that fails by itself fails the test.
pub fn kill_child_after(mut child: Child, ready: &Path, life: Duration) -> bool {
    let start = Instant::now();
    let mut since_ready: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            let mut text = String::new();
            _ = child.stdout.take().unwrap().read_to_string(&mut text);
            _ = child.stderr.take().unwrap().read_to_string(&mut text);
            assert!(status.success(), "the child failed by itself:\n{text}");
            return true;
        }
        if since_ready.is_none() && ready.exists() {
            since_ready = Some(Instant::now());
        }
        if since_ready.is_some_and(|t| t.elapsed() >= life) {
            child.kill().unwrap();
            child.wait().unwrap();
            return false;
        }
        assert!(start.elapsed() < Duration::from_secs(300), "the child never made {}", ready.display());
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The directory that a child was given; panics in a process that is no child.
pub fn child_dir() -> std::path::PathBuf {
    std::env::var_os("TUNEBOOK_CHILD").expect("started by another test").into()
}

const STEPS: u64 = 40;

pub fn dataset() -> Dataset {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let example = |_| {
        let length = rng.random_range(8..40);
        let ids: Vec<u32> = (0..length).map(|_| rng.random_range(3..320)).collect();
        Example::completion_only(ids, 4)
    };
    Dataset::new((0..50).map(example).collect()).unwrap()
}

/// What a run depends on besides its data: NF4 base, 8-bit and 32-bit moments (tensors on both sides of 4096 elements),
/// dropout, accumulation over the end of an epoch, a new order in each epoch, clipping and a schedule.
fn new_run(dir: &Path) -> Run {
    let base = Base::from_dir(golden("tiny/tiny-mistral/base")).unwrap();
    let plan = MemoryPlan::qlora(base.spec())
        .cpu()
        .r(32)
        .lora_alpha(16.0)
        .lora_dropout(0.1)
        .batch(3)
        .seq(40)
        .optim(Optim::AdamW8bit)
        .build()
        .unwrap();
    let config = TrainConfig::default()
        .optim(Optim::AdamW8bit)
        .per_device_train_batch_size(3)
        .gradient_accumulation_steps(2)
        .max_steps(STEPS)
        .learning_rate(2e-3)
        .lr_scheduler_type(LrScheduler::Cosine)
        .warmup_steps(3)
        .save_steps(3)
        .save_total_limit(2);
    Run::create(dir, plan, base, dataset(), config).unwrap()
}

/// Goes on with the run in its directory, or makes it, and trains it to its end.
#[test]
#[ignore = "a child of killed_runs_end_as_if_nothing_had_happened"]
fn child_run() {
    let dir = child_dir();
    let path = dir.join("run");
    let mut run = if path.join("run.json").exists() { Run::resume(&path).unwrap() } else { new_run(&path) };
    std::fs::write(dir.join("ready"), "").unwrap();
    while !run.is_finished() {
        run.step().unwrap();
    }
}

/// The numbers of a step that do not depend on time.
fn numbers(r: &StepReport) -> (u64, [u64; 4], [u64; 2], bool) {
    let bits = [r.epoch, r.loss, r.grad_norm, r.learning_rate].map(f64::to_bits);
    (r.step, bits, [r.tokens, r.trained_tokens], r.clipped)
}

fn read(dir: &Path, file: &str) -> Vec<u8> {
    std::fs::read(dir.join(format!("run/checkpoints/step-{STEPS}/{file}"))).unwrap()
}

/// `TUNEBOOK_KILLS` asks for more kills than the usual 25.
#[test]
fn killed_runs_end_as_if_nothing_had_happened() {
    let tmp = TempDir::new().unwrap();
    let straight = tmp.path().join("straight");
    let mut run = new_run(&straight.join("run"));
    run.train().unwrap();
    drop(run);
    let expected = Metrics::read(straight.join("run")).unwrap();
    assert_eq!(expected.steps.len() as u64, STEPS);
    assert!(expected.steps.iter().any(|r| r.clipped) && expected.steps[39].loss < expected.steps[0].loss);

    let wanted: u32 = std::env::var("TUNEBOOK_KILLS").map_or(25, |n| n.parse().unwrap());
    let mut rng = ChaCha8Rng::seed_from_u64(21);
    let (mut kills, mut at_start, mut resumed, mut cut, mut longest) = (0, 0, 0, 0, 150);
    for round in 0.. {
        let dir = tmp.path().join(format!("killed-{round}"));
        std::fs::create_dir(&dir).unwrap();
        loop {
            _ = std::fs::remove_file(dir.join("ready"));
            let early = rng.random_bool(0.2);
            let threads = rng.random_range(1..=3).to_string();
            let child = spawn_child("kill_resume::child_run", &dir, &[("RAYON_NUM_THREADS", &threads)]);
            // Some die while they load, most while they train.
            let ready = if early { dir.clone() } else { dir.join("ready") };
            let life = Duration::from_micros(rng.random_range(0..longest * 1000));
            if kill_child_after(child, &ready, life) {
                break;
            }
            kills += 1;
            at_start += u32::from(early);
            let names = std::fs::read_dir(dir.join("run/checkpoints")).into_iter().flatten();
            cut +=
                names.filter(|e| e.as_ref().is_ok_and(|e| e.file_name().as_encoded_bytes().starts_with(b"."))).count();
            // On a slow machine a life must be long enough for a few steps.
            longest += if kills % 20 == 0 && resumed == 0 { 100 } else { 0 };
        }
        let found = Metrics::read(dir.join("run")).unwrap();
        assert_eq!(
            found.steps.iter().map(numbers).collect::<Vec<_>>(),
            expected.steps.iter().map(numbers).collect::<Vec<_>>()
        );
        for file in ["adapter_model.safetensors", "optimizer.safetensors"] {
            assert_eq!(read(&dir, file), read(&straight, file), "{file} after {kills} kills");
        }
        resumed += found.resumes().len();
        if kills >= wanted && resumed >= 5 {
            break;
        }
    }
    println!("{kills} kills, {at_start} of them while loading, {cut} within a checkpoint; {resumed} resumes");
}

/// Each method and optimizer, stopped in the middle of an accumulation and resumed, against going straight through.
#[test]
fn every_kind_of_run_resumes() {
    let base = Base::from_dir(golden("tiny/tiny-mistral/base")).unwrap();
    let (lora, qlora, full) =
        (MemoryPlan::lora(base.spec()), MemoryPlan::qlora(base.spec()), MemoryPlan::full(base.spec()));
    let kinds = [
        (full.clone(), Optim::AdamW),
        (full, Optim::PagedAdamW8bit),
        (lora.clone().r(8), Optim::AdamW8bit),
        (lora.r(4), Optim::PagedAdamW32bit),
        (qlora.r(8).lora_dropout(0.2), Optim::PagedAdamW8bit),
    ];
    let tmp = TempDir::new().unwrap();
    for (kind, (plan, optim)) in kinds.into_iter().enumerate() {
        let dir = |name: &str| tmp.path().join(format!("{kind}-{name}"));
        let create = |name: &str| {
            let plan = plan.clone().cpu().batch(2).seq(40).optim(optim).build().unwrap();
            let config = TrainConfig::default()
                .optim(optim)
                .per_device_train_batch_size(2)
                .gradient_accumulation_steps(2)
                .max_steps(8)
                .learning_rate(1e-3)
                .save_steps(2)
                .group_by_length(kind % 2 == 0);
            Run::create(dir(name), plan, base.clone(), dataset(), config).unwrap()
        };
        let mut straight = create("straight");
        straight.train().unwrap();
        let mut run = create("stopped");
        run.steps(5).unwrap();
        run.micro_step().unwrap();
        drop(run);
        let mut run = Run::resume(dir("stopped")).unwrap();
        assert_eq!(run.step_count(), 4);
        run.train().unwrap();
        assert_eq!(run.history().unwrap().resumes(), [4]);
        let steps = |run: &Run| run.history().unwrap().steps.iter().map(numbers).collect::<Vec<_>>();
        assert_eq!(steps(&run), steps(&straight), "{optim}, kind {kind}");
        let end = |name: &str| CheckpointDir::open(dir(name).join("checkpoints/step-8")).unwrap();
        for (a, b) in end("straight").manifest().files.iter().zip(&end("stopped").manifest().files) {
            // The state says that one of them was resumed.
            assert!(a == b || a.name == "state.json", "{optim}, kind {kind}: {a:?} {b:?}");
        }
    }
}
