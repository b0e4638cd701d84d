//! What a run refuses, and what it says; and that a loss that is not finite loses nothing that was saved.

use tunebook::data::{Dataset, Example};
use tunebook::lora::Adapter;
use tunebook::model::Base;
use tunebook::plan::MemoryPlan;
use tunebook::train::{Optim, Run, TrainConfig};

use super::trajectory::dataset;
use crate::support::golden;

fn base() -> Base {
    Base::from_dir(golden("tiny/tiny-mistral/base")).unwrap()
}

fn plan() -> MemoryPlan {
    MemoryPlan::lora(base().spec()).cpu().r(4).batch(2).seq(48).build().unwrap()
}

fn config() -> TrainConfig {
    TrainConfig::default().max_steps(4).per_device_train_batch_size(2).save_steps(1)
}

fn refused(plan: MemoryPlan, data: Dataset, config: TrainConfig) -> String {
    let dir = tempfile::tempdir().unwrap();
    let e = Run::create(dir.path().join("run"), plan, base(), data, config).map(|_| ()).unwrap_err();
    assert!(!dir.path().join("run/run.json").exists(), "a refused run leaves no run");
    e.to_string()
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let data = || dataset("tiny-mistral");
    let e = refused(plan(), data(), config().optim(Optim::AdamW8bit));
    assert!(e.contains("optim") && e.contains("adamw_8bit"), "{e}");
    let e = refused(plan(), data(), config().per_device_train_batch_size(8));
    assert!(e.contains("does not fit into the plan") && e.contains("at most 96 tokens"), "{e}");
    let alien = Dataset::new(vec![Example::all_trained(vec![1, 5000, 2])]).unwrap();
    let e = refused(plan(), alien, config());
    assert!(e.contains("vocabulary") && e.contains("5000"), "{e}");
    let inference = MemoryPlan::inference(base().spec()).cpu().build().unwrap();
    let e = refused(inference, data(), config());
    assert!(e.contains("something to train"), "{e}");
    let gpu = MemoryPlan::lora(base().spec()).r(4).batch(2).seq(48).build().unwrap();
    let e = refused(gpu, data(), config());
    assert!(e.contains(".cpu()"), "{e}");
}

#[test]
fn a_run_goes_to_its_end_and_no_further() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let mut run = Run::create(&path, plan(), base(), dataset("tiny-mistral"), config()).unwrap();
    let e = Run::create(&path, plan(), base(), dataset("tiny-mistral"), config()).map(|_| ()).unwrap_err();
    assert!(e.to_string().contains("Run::resume"), "{e}");
    run.micro_step().unwrap();
    let e = run.micro_step().unwrap_err();
    assert!(e.to_string().contains("call step()"), "{e}");
    let steps = run.train().unwrap();
    assert_eq!((steps.reports.len(), steps.step, steps.interrupted), (4, 4, false));
    let e = run.step().unwrap_err();
    assert!(e.to_string().contains("the run is over"), "{e}");
    drop(run);
    assert!(Run::resume(&path).unwrap().is_finished());
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_names_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let mut run = Run::create(&path, plan(), base(), dataset("tiny-mistral"), config()).unwrap();
    run.step().unwrap();
    let whole = run.adapter().unwrap();
    let mut broken: Adapter = whole.clone();
    broken.tensors.values_mut().next().unwrap().b.fill(f32::INFINITY);
    run.engine().load_adapter(&broken).unwrap();
    let e = run.step().unwrap_err().to_string();
    assert!(e.contains("not finite") && e.contains("step 2") && e.contains("Run::resume"), "{e}");
    let saved = std::fs::read_to_string(path.join("not-finite-step-2.json")).unwrap();
    assert!(saved.contains("input_ids"), "{saved}");
    assert!(run.step().unwrap_err().to_string().contains("cannot go on"));
    assert!(run.checkpoint().is_err(), "what failed is not saved over what was whole");
    drop(run);
    let mut again = Run::resume(&path).unwrap();
    assert_eq!(again.step_count(), 1);
    assert_eq!(again.adapter().unwrap().tensors, whole.tensors);
    again.train().unwrap();
}

#[test]
fn a_base_that_changed_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("base");
    std::fs::create_dir(&copy).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("tiny/tiny-mistral/base").join(file), copy.join(file)).unwrap();
    }
    let path = dir.path().join("run");
    let run = Run::create(&path, plan(), Base::from_dir(&copy).unwrap(), dataset("tiny-mistral"), config()).unwrap();
    drop(run);
    let config = std::fs::read_to_string(copy.join("config.json")).unwrap();
    std::fs::write(copy.join("config.json"), config.replace("10000.0", "20000.0")).unwrap();
    let e = Run::resume(&path).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains("base"), "{e}");
}
