//! What rust-analyzer is told about dependencies: only those whose types a cell can see. It loads what it is told of, and
//! its share of a first `let` is seconds with all packages, one with these; rustc knows them all either way.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Value, json};

use crate::toolchain::Toolchain;

/// Packages whose types appear in the library's public functions, with what these are made of.
const SEEN: [&str; 8] = ["tunebook", "candle-core", "candle-nn", "half", "polars", "polars-core", "serde_json", "toml"];

/// `cargo metadata` of the crate in `dir`.
///
/// # Errors
/// cargo's own.
pub fn ask(toolchain: &Toolchain, dir: &Path) -> Result<Value, String> {
    let mut command = toolchain.cargo_command();
    command.current_dir(dir).args(["metadata", "--format-version", "1", "--filter-platform", &toolchain.host]);
    let output = command.output().map_err(|e| format!("{}: {e}", toolchain.cargo.display()))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|e| format!("cargo metadata: {e}"))
}

/// The answer for rust-analyzer: the crate `ctx`, the packages of [`SEEN`], and the dependencies named in `own` with all that
/// they depend on. The library's sources are read from `source`.
pub fn for_analysis(full: &Value, source: &Path, repository: &Path, own: &[String]) -> Value {
    let empty = Vec::new();
    let packages = full["packages"].as_array().unwrap_or(&empty);
    let nodes = full["resolve"]["nodes"].as_array().unwrap_or(&empty);
    let root = full["workspace_members"][0].as_str().unwrap_or_default();

    let mut keep: HashSet<&str> = HashSet::from([root]);
    for p in packages {
        let library = p["name"] != "tunebook"
            || p["manifest_path"].as_str().is_some_and(|m| Path::new(m).starts_with(repository));
        if SEEN.iter().any(|s| p["name"] == *s) && library {
            keep.extend(p["id"].as_str());
        }
    }
    let dependencies = |id: &str| {
        let node = nodes.iter().find(|n| n["id"] == id);
        node.and_then(|n| n["deps"].as_array()).unwrap_or(&empty).iter()
    };
    let mut todo: Vec<&str> = dependencies(root)
        .filter(|d| own.iter().any(|o| d["name"] == o.replace('-', "_").as_str() || package(packages, &d["pkg"]) == o))
        .filter_map(|d| d["pkg"].as_str())
        .collect();
    while let Some(id) = todo.pop() {
        if keep.insert(id) {
            todo.extend(dependencies(id).filter_map(|d| d["pkg"].as_str()));
        }
    }

    let mut out = full.clone();
    if let Some(all) = out["packages"].as_array_mut() {
        all.retain(|p| p["id"].as_str().is_some_and(|id| keep.contains(id)));
        for p in all.iter_mut() {
            if let Some(targets) = p["targets"].as_array_mut() {
                targets.retain(is_library);
            }
            if p["name"] == "tunebook"
                && p["manifest_path"].as_str().is_some_and(|m| Path::new(m).starts_with(repository))
            {
                move_library(p, repository, source);
            }
        }
    }
    if let Some(all) = out["resolve"]["nodes"].as_array_mut() {
        all.retain(|n| n["id"].as_str().is_some_and(|id| keep.contains(id)));
        for n in all.iter_mut() {
            if let Some(deps) = n["deps"].as_array_mut() {
                deps.retain(|d| d["pkg"].as_str().is_some_and(|id| keep.contains(id)));
            }
            if let Some(deps) = n["dependencies"].as_array_mut() {
                deps.retain(|d| d.as_str().is_some_and(|id| keep.contains(id)));
            }
        }
    }
    out
}

fn package<'a>(packages: &'a [Value], id: &Value) -> &'a str {
    packages.iter().find(|p| p["id"] == *id).and_then(|p| p["name"].as_str()).unwrap_or_default()
}

/// Examples, tests and programs would be read, too.
fn is_library(target: &Value) -> bool {
    let kinds = target["kind"].as_array();
    kinds.is_some_and(|k| k.iter().any(|k| k.as_str().is_some_and(|k| k.ends_with("lib") || k == "proc-macro")))
}

/// The library, read from another place.
fn move_library(package: &mut Value, repository: &Path, source: &Path) {
    package["manifest_path"] = json!(source.join("Cargo.toml"));
    if let Some(targets) = package["targets"].as_array_mut() {
        for t in targets {
            let path = t["src_path"].as_str().map(Path::new).and_then(|p| p.strip_prefix(repository).ok());
            if let Some(path) = path {
                t["src_path"] = json!(source.join(path));
            }
        }
    }
}

/// The same answer for the crate that evcxr writes in `context`.
pub fn at(mut metadata: Value, context: &Path) -> Value {
    let root = metadata["workspace_members"][0].clone();
    if let Some(p) = metadata["packages"].as_array_mut().and_then(|all| all.iter_mut().find(|p| p["id"] == root)) {
        p["manifest_path"] = json!(context.join("Cargo.toml"));
        p["targets"][0]["src_path"] = json!(context.join("src/lib.rs"));
    }
    metadata["workspace_root"] = json!(context);
    metadata["target_directory"] = json!(context.join("target"));
    metadata
}

/// The same answer without all that is no member of the workspace; for a library of the system, nothing.
pub fn of_root(mut full: Value) -> Value {
    let root = full["workspace_members"].as_array().filter(|m| m.len() == 1).map(|m| m[0].clone()).unwrap_or_default();
    if let Some(packages) = full["packages"].as_array_mut() {
        packages.retain(|p| p["id"] == root);
    }
    if root.is_null() {
        full["workspace_members"] = json!([]);
        full["workspace_default_members"] = json!([]);
    }
    if let Some(nodes) = full["resolve"]["nodes"].as_array_mut() {
        nodes.retain(|n| n["id"] == root);
        for n in nodes {
            n["deps"] = json!([]);
            n["dependencies"] = json!([]);
        }
    }
    full
}

/// The standard library as far as types of variables need it: three packages that know each other. What these are made of in
/// turn would be read for nothing.
pub fn of_sysroot(mut full: Value, no_deps: bool) -> Value {
    const KEEP: [(&str, &[&str]); 3] = [("core", &[]), ("alloc", &["core"]), ("std", &["core", "alloc"])];
    let packages = full["packages"].as_array().cloned().unwrap_or_default();
    let id = |name: &str| packages.iter().find(|p| p["name"] == name).map(|p| p["id"].clone());
    let nodes: Vec<Value> = KEEP
        .iter()
        .filter_map(|(name, deps)| {
            let deps: Vec<(&str, Value)> = deps.iter().filter_map(|d| Some((*d, id(d)?))).collect();
            let edges = deps.iter().map(|(name, pkg)| {
                json!({
                    "name": name, "pkg": pkg, "dep_kinds": [{"kind": null, "target": null}],
                })
            });
            Some(json!({
                "id": id(name)?, "features": [], "deps": edges.collect::<Vec<_>>(),
                "dependencies": deps.iter().map(|(_, pkg)| pkg).collect::<Vec<_>>(),
            }))
        })
        .collect();
    let ids: Vec<Value> = nodes.iter().map(|n| n["id"].clone()).collect();
    full["packages"] = packages.into_iter().filter(|p| ids.contains(&p["id"])).collect();
    full["workspace_members"] = json!(ids);
    full["workspace_default_members"] = json!(ids);
    full["resolve"] = if no_deps { Value::Null } else { json!({"nodes": nodes, "root": null}) };
    full
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_library_is_three_packages() {
        let package = |name: &str| json!({"name": name, "id": format!("id of {name}")});
        let full = json!({"packages": [package("std"), package("test"), package("core"), package("alloc")]});
        let out = of_sysroot(full.clone(), false);
        let names: Vec<&str> = out["packages"].as_array().unwrap().iter().filter_map(|p| p["name"].as_str()).collect();
        assert_eq!(names, ["std", "core", "alloc"]);
        assert_eq!(out["resolve"]["nodes"][2]["deps"][1]["pkg"], "id of alloc");
        assert!(of_sysroot(full, true)["resolve"].is_null());
        let nothing = of_root(out);
        assert_eq!((&nothing["packages"], &nothing["resolve"]["nodes"]), (&json!([]), &json!([])));
    }

    #[test]
    fn analysis_sees_what_cells_can_see() {
        let package = |name: &str, path: &str| {
            json!({
                "name": name, "id": name, "manifest_path": path,
                "targets": [{"kind": ["lib"], "src_path": "/repo/src/lib.rs"}, {"kind": ["bin"], "src_path": "/repo/src/bin.rs"}],
            })
        };
        let node = |id: &str, deps: &[&str]| {
            json!({
                "id": id, "dependencies": deps,
                "deps": deps.iter().map(|d| json!({"name": d, "pkg": d})).collect::<Vec<_>>(),
            })
        };
        let full = json!({
            "workspace_members": ["ctx"],
            "packages": [package("ctx", "/s/Cargo.toml"), package("tunebook", "/repo/Cargo.toml"), package("half", "/r/h"),
                package("rayon", "/r/r"), package("regex", "/r/x"), package("memchr", "/r/m")],
            "resolve": {"nodes": [node("ctx", &["tunebook", "regex"]), node("tunebook", &["half", "rayon"]),
                node("regex", &["memchr"])]},
        });
        let out = for_analysis(&full, Path::new("/t/source"), Path::new("/repo"), &["regex".into()]);
        let names: Vec<&str> = out["packages"].as_array().unwrap().iter().filter_map(|p| p["name"].as_str()).collect();
        assert_eq!(names, ["ctx", "tunebook", "half", "regex", "memchr"]);
        assert_eq!(out["packages"][1]["targets"], json!([{"kind": ["lib"], "src_path": "/t/source/src/lib.rs"}]));
        assert_eq!(out["resolve"]["nodes"][1]["dependencies"], json!(["half"]));
    }
}
