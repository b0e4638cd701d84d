//! A process that is stopped at, or refused, each single change that it makes to the disk; and bits that flip there.
//!
//! The real program runs, unchanged, in a child whose system calls the parent sees (`ptrace`). Calls that change files are
//! counted; at the chosen one the child is killed, or the call fails with EIO, ENOSPC or EACCES.

#[path = "faults/trace.rs"]
mod trace;

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tunebook::lora::MergeBase;
use tunebook::train::{
    CheckpointDir, RunDir, RunRecord, clean_leftovers, load_dataset, save_dataset, scan_checkpoints,
};

use crate::checkpoint::{check, listing, new_run, save};
use crate::kill_resume::child_dir;
use trace::{End, Fault, run_with_fault};

/// More changes than a checkpoint makes.
const MANY: usize = 400;

/// Runs the child with the fault at change 0, 1, 2 and so on, each time on a fresh copy of `prepare`'s directory, until it ends
/// without having met it. The number of changes; `None` where processes may not be traced.
fn at_every_change(
    test: &str,
    fault: Fault,
    prepare: &dyn Fn(&Path),
    then: &mut dyn FnMut(usize, &Path, &End),
) -> Option<usize> {
    for n in 0..MANY {
        let tmp = TempDir::new().unwrap();
        prepare(tmp.path());
        let Some(end) = run_with_fault(test, tmp.path(), n, fault) else {
            eprintln!("skipped: this process may not trace another one");
            return None;
        };
        if !end.met {
            assert_eq!(end.code, Some(0), "{}", end.text);
            return Some(n);
        }
        then(n, tmp.path(), &end);
    }
    panic!("the child makes more than {MANY} changes");
}

#[test]
#[ignore = "a child of a_checkpoint_is_whole_or_absent_wherever_its_writer_is_stopped"]
fn child_saves() {
    let (run, _) = RunDir::open(child_dir().join("run")).unwrap();
    trace::begin();
    match save(&run, 2, Some(1)) {
        Ok(c) => assert_eq!(c.step(), 2),
        Err(e) => {
            println!("said: {e}");
            trace::exit(7);
        }
    }
    trace::exit(0);
}

fn run_with_one_checkpoint(dir: &Path) {
    let run = new_run(&dir.join("run"));
    save(&run, 1, None).unwrap();
}

/// The newest checkpoint's step; none may be damaged.
fn newest(run: &Path, place: &str) -> u64 {
    let scan = scan_checkpoints(run).unwrap();
    assert!(scan.damaged.is_empty(), "{place}: {:?}", scan.damaged);
    scan.newest.as_ref().map_or(0, check)
}

#[test]
fn a_checkpoint_is_whole_or_absent_wherever_its_writer_is_stopped() {
    let mut steps = vec![];
    let then = &mut |n: usize, dir: &Path, _: &End| {
        let run = dir.join("run");
        steps.push(newest(&run, &format!("stopped at change {n}")));
        // The next process cleans up, and writes it whole.
        let (open, _) = RunDir::open(&run).unwrap();
        clean_leftovers(&open).unwrap();
        save(&open, 2, Some(1)).unwrap();
        assert_eq!(newest(&run, "after"), 2);
        assert_eq!(listing(&open.checkpoints()), ["step-2"], "stopped at change {n}");
    };
    let Some(changes) = at_every_change("faults::child_saves", Fault::Kill, &run_with_one_checkpoint, then) else {
        return;
    };
    println!("{changes} changes");
    assert!(changes > 20 && steps.is_sorted() && steps[0] == 1 && steps.last() == Some(&2), "{steps:?}");
}

#[test]
fn a_checkpoint_that_meets_an_error_says_so_and_harms_nothing() {
    let errors = [(libc::ENOSPC, "space"), (libc::EIO, "disk"), (libc::EACCES, "ermission")];
    for (fault, said) in errors.map(|(error, said)| (Fault::Error(error), said)) {
        let (mut refused, mut survived) = (0, 0);
        let then = &mut |n: usize, dir: &Path, end: &End| {
            let run = dir.join("run");
            let step = newest(&run, &format!("{fault:?} at change {n}"));
            match end.code {
                Some(7) => {
                    refused += 1;
                    assert!(end.text.contains("said: ") && end.text.contains(said), "change {n}: {}", end.text);
                    assert!(step >= 1, "change {n}");
                }
                // A change that nothing depends on, such as the removal of what was replaced.
                Some(0) => {
                    survived += 1;
                    assert_eq!(step, 2, "change {n}");
                }
                other => panic!("change {n}: {other:?} {}", end.text),
            }
            let (open, _) = RunDir::open(&run).unwrap();
            clean_leftovers(&open).unwrap();
            save(&open, 3, Some(1)).unwrap();
            assert_eq!(newest(&run, "after"), 3);
        };
        if at_every_change("faults::child_saves", fault, &run_with_one_checkpoint, then).is_none() {
            return;
        }
        println!("{fault:?}: {refused} refused, {survived} survived");
        assert!(refused > 15 && refused > survived);
    }
}

#[test]
#[ignore = "a child of a_run_exists_whole_or_not_at_all"]
fn child_creates() {
    let dir = child_dir();
    trace::begin();
    let run = RunDir::create(dir.join("run")).unwrap();
    save_dataset(run.dataset(), &crate::kill_resume::dataset()).unwrap();
    run.commit(&crate::checkpoint::record()).unwrap();
    trace::exit(0);
}

#[test]
fn a_run_exists_whole_or_not_at_all() {
    let mut existed = vec![];
    let then = &mut |n: usize, dir: &Path, _: &End| {
        let run = dir.join("run");
        let exists = RunRecord::read(&run).is_ok();
        existed.push(exists);
        if exists {
            load_dataset(run.join("dataset.safetensors")).unwrap();
        } else {
            RunDir::create(&run).unwrap_or_else(|e| panic!("stopped at change {n}: {e}"));
        }
    };
    let Some(changes) = at_every_change("faults::child_creates", Fault::Kill, &|_| {}, then) else { return };
    assert!(changes > 8 && existed.is_sorted() && !existed[0] && existed.last() == Some(&true), "{existed:?}");
}

#[test]
fn no_flipped_bit_of_a_checkpoint_goes_unnoticed() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    save(&run, 1, None).unwrap();
    save(&run, 2, None).unwrap();
    let dir = run.checkpoints().join("step-2");
    let (mut flips, mut files) = (0, 0);
    for name in listing(&dir) {
        let path = dir.join(&name);
        let whole = fs::read(&path).unwrap();
        files += 1;
        // Every byte of small files, and spread over large ones: header, middle, end.
        for at in (0..whole.len()).step_by(whole.len() / 150 + 1).chain([whole.len() - 1]) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&path, bytes).unwrap();
            let scan = scan_checkpoints(run.path()).unwrap();
            assert_eq!(scan.newest.as_ref().map(CheckpointDir::step), Some(1), "{name}, bit {} of byte {at}", at % 8);
            assert!(scan.damaged[0].path == dir, "{name}, byte {at}");
            flips += 1;
        }
        fs::write(&path, whole).unwrap();
        assert_eq!(newest(run.path(), &name), 2);
    }
    println!("{flips} flips in {files} files");
    assert!(files == 5 && flips > 500);
}

#[test]
fn no_flipped_bit_of_a_runs_record_or_data_goes_unnoticed() {
    let tmp = TempDir::new().unwrap();
    let run = new_run(&tmp.path().join("run"));
    let path = run.path().join("run.json");
    let whole = fs::read(&path).unwrap();
    let record = RunRecord::read(run.path()).unwrap();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, bytes).unwrap();
        assert!(RunRecord::read(run.path()).is_err(), "bit {} of byte {at}", at % 8);
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(RunRecord::read(run.path()).unwrap(), record);
    // The data set is known by its fingerprint, which the record holds.
    let data = crate::kill_resume::dataset();
    save_dataset(run.dataset(), &data).unwrap();
    let whole = fs::read(run.dataset()).unwrap();
    for at in (0..whole.len()).step_by(13) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(run.dataset(), bytes).unwrap();
        let same = load_dataset(run.dataset()).is_ok_and(|d| d.fingerprint() == data.fingerprint());
        // A space of the header's padding that turned into a tab is still white.
        assert!(!same || whole[at] == b' ', "bit {} of byte {at}", at % 8);
    }
}

/// Mounts a file system in a mount namespace of this process's own, which ends with it. Exits with 9 where that is not allowed.
fn mount_or_exit(mounts: &[(&std::ffi::CStr, &Path, &std::ffi::CStr, libc::c_ulong, &std::ffi::CStr)]) {
    // SAFETY: changes this process only.
    let mut mounted = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0;
    for (source, target, kind, flags, options) in mounts {
        let target = std::ffi::CString::new(target.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: NUL-terminated strings that live through the call.
        mounted = mounted
            && unsafe {
                libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), *flags, options.as_ptr().cast()) == 0
            };
    }
    if !mounted {
        std::process::exit(9);
    }
}

/// Runs a child that mounts what it needs, if it may.
fn run_with_mounts(test: &str, dir: &Path) {
    let (status, text) = crate::kill_resume::run_child(test, dir, &[]);
    if status.code() == Some(9) {
        eprintln!("skipped: this process may not mount a disk");
        return;
    }
    assert!(status.success(), "{text}");
}

/// A disk of one megabyte that is filled up, and freed.
#[test]
#[ignore = "a child of a_full_disk_is_named"]
fn child_fills_the_disk() {
    let disk = child_dir().join("disk");
    let private = (c"none", Path::new("/"), c"", libc::MS_REC | libc::MS_PRIVATE, c"");
    mount_or_exit(&[private, (c"tmpfs", &disk, c"tmpfs", 0, c"size=1m")]);
    run_with_one_checkpoint(&disk);
    let (run, _) = RunDir::open(disk.join("run")).unwrap();
    let ballast = disk.join("ballast");
    let mut file = fs::File::create(&ballast).unwrap();
    while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    let e = save(&run, 2, Some(1)).unwrap_err().to_string();
    assert!(e.contains("space") && e.contains("disk/run"), "{e}");
    assert_eq!(newest(&disk.join("run"), "full"), 1);
    drop(file);
    fs::remove_file(ballast).unwrap();
    save(&run, 3, Some(1)).unwrap();
    assert_eq!(newest(&disk.join("run"), "freed"), 3);
}

#[test]
fn a_full_disk_is_named() {
    let tmp = TempDir::new().unwrap();
    fs::create_dir(tmp.path().join("disk")).unwrap();
    run_with_mounts("faults::child_fills_the_disk", tmp.path());
}

/// A merge, which writes several files at a time, onto disks that are full sooner or later.
#[test]
#[ignore = "a child of a_merge_that_fills_the_disk_leaves_nothing"]
fn child_merges_onto_a_full_disk() {
    let disk = child_dir().join("disk");
    let private = (c"none", Path::new("/"), c"", libc::MS_REC | libc::MS_PRIVATE, c"");
    mount_or_exit(&[private, (c"tmpfs", &disk, c"tmpfs", 0, c"size=4m")]);
    let (model, merged, ballast) = (child_dir().join("model"), disk.join("merged"), disk.join("ballast"));
    // 2.2 MB in weights of up to 200 KB.
    crate::lora::synthetic(&model, candle_core::DType::BF16, 256, 8, 0.1);
    let merge = || {
        let merge = tunebook::lora::merge(model.join("base"), model.join("adapter")).unwrap();
        merge.onto(MergeBase::Original).max_shard_bytes(400_000).save(&merged)
    };
    // From a disk that takes no file to one that takes all of them.
    let mut refused = 0;
    for free in (1..).map(|n| n * (60 << 10)) {
        fs::write(&ballast, vec![1; (4 << 20) - free]).unwrap();
        let Err(e) = merge().map(|_| ()).map_err(|e| e.to_string()) else { break };
        assert!(e.contains("space") && e.contains("disk/"), "{free} bytes: {e}");
        assert_eq!(listing(&disk), ["ballast"], "{free} bytes");
        refused += 1;
    }
    let files = tunebook::model::Base::from_dir(&merged).unwrap().checkpoint().shards().len();
    println!("refused {refused} times; {files} files");
    assert!(refused > 20 && files > 4, "{refused} {files}");
}

#[test]
fn a_merge_that_fills_the_disk_leaves_nothing() {
    let tmp = TempDir::new().unwrap();
    fs::create_dir(tmp.path().join("disk")).unwrap();
    run_with_mounts("faults::child_merges_onto_a_full_disk", tmp.path());
}

/// A directory on a file system that is mounted read-only.
#[test]
#[ignore = "a child of a_read_only_disk_is_named"]
fn child_reads_only() {
    let dir = child_dir();
    let disk = dir.join("disk");
    let same = std::ffi::CString::new(disk.as_os_str().as_encoded_bytes()).unwrap();
    mount_or_exit(&[
        (c"none", Path::new("/"), c"", libc::MS_REC | libc::MS_PRIVATE, c""),
        (&same, &disk, c"", libc::MS_BIND, c""),
        (c"none", &disk, c"", libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY, c""),
    ]);
    let run: PathBuf = dir.join("disk/run");
    // It can be looked at, and not written.
    assert_eq!(newest(&run, "read-only"), 1);
    RunRecord::read(&run).unwrap();
    let e = RunDir::open(&run).unwrap_err().to_string();
    assert!(e.contains("can be written") && e.contains("disk/run"), "{e}");
    let e = RunDir::create(dir.join("disk/other")).unwrap_err().to_string();
    assert!(e.contains("can be written") && e.contains("disk/other"), "{e}");
}

#[test]
fn a_read_only_disk_is_named() {
    let tmp = TempDir::new().unwrap();
    fs::create_dir(tmp.path().join("disk")).unwrap();
    run_with_one_checkpoint(&tmp.path().join("disk"));
    run_with_mounts("faults::child_reads_only", tmp.path());
}
