//! Link arguments of the cdylib that the manifest has no words for, and the CUDA kernels.
//!
//! `INDEXCACHE_CUDA`: `auto` (default; kernels if nvcc is found), `require` (fail without it), `off`.
//! `INDEXCACHE_CUDA_ARCHS`: compute capabilities to compile for, default `80;90a`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        // The name that programs record. The number changes when the C ABI breaks.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libindexcache.so.0");
        // Threads that called the library run its thread-local destructors when they exit, maybe after dlclose.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
    if let Err(why) = kernels() {
        println!("cargo:warning={why}");
        std::process::exit(1);
    }
}

/// Compiles the kernels and writes the tables of images: the library's, that `backend::cuda` embeds, and with feature
/// `cli` those that `indexcache bench` measures ceilings with.
fn kernels() -> Result<(), String> {
    for name in ["INDEXCACHE_CUDA", "INDEXCACHE_CUDA_ARCHS", "CUDA_HOME", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let wanted = env::var("INDEXCACHE_CUDA").unwrap_or_else(|_| "auto".into());
    let nvcc = match wanted.as_str() {
        "off" => None,
        "auto" => find_nvcc(),
        "require" => Some(find_nvcc().ok_or(
            "INDEXCACHE_CUDA=require, but there is no nvcc: set CUDA_HOME, put nvcc on PATH, or `pip install \
             nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl`",
        )?),
        other => {
            return Err(format!("INDEXCACHE_CUDA: expected auto, require or off, got {other}"));
        }
    };
    images(nvcc.as_deref(), "kernels", "cuda_images.rs")?;
    if env::var_os("CARGO_FEATURE_CLI").is_some() {
        images(nvcc.as_deref(), "src/bin/indexcache/bench/kernels", "bench_images.rs")?;
    }
    Ok(())
}

/// Compiles a folder's `*.cu`, if there is a compiler, and writes the table of their images.
fn images(nvcc: Option<&Path>, folder: &str, table_file: &str) -> Result<(), String> {
    println!("cargo:rerun-if-changed={folder}");
    let archs = env::var("INDEXCACHE_CUDA_ARCHS").unwrap_or_else(|_| "80;90a".into());
    let archs: Vec<&str> = archs.split([';', ',', ' ']).filter(|a| !a.is_empty()).collect();
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);

    let mut table = String::from("pub(super) static IMAGES: &[Image] = &[\n");
    if let Some(nvcc) = nvcc {
        let mut sources: Vec<PathBuf> = fs::read_dir(folder)
            .map_err(|e| format!("{folder}: {e}"))?
            .filter_map(|f| Some(f.ok()?.path()))
            .filter(|f| f.extension().is_some_and(|e| e == "cu"))
            .collect();
        sources.sort();
        let mut running = Vec::new();
        for source in &sources {
            let name =
                source.file_stem().and_then(|n| n.to_str()).ok_or("a kernel without a name")?;
            let image = out.join(format!("{name}.fatbin"));
            let Some((command, arch)) = compile(nvcc, source, name, &archs, &image)? else {
                continue;
            };
            running.push(command);
            table += &format!(
                "    Image {{ name: {name:?}, arch: {arch:?}, code: &Aligned(*include_bytes!({image:?})) }},\n"
            );
        }
        run(running)?;
    }
    table += "];\n";
    let path = out.join(table_file);
    fs::write(path, table).map_err(|e| format!("{table_file}: {e}"))
}

/// The command for one file. A name that ends in `_sm90` is code for that architecture alone; others run anywhere,
/// through PTX where there is no machine code.
fn compile(
    nvcc: &Path,
    source: &Path,
    name: &str,
    archs: &[&str],
    image: &Path,
) -> Result<Option<(Command, Option<u32>)>, String> {
    let only = name.rsplit_once("_sm").and_then(|(_, n)| n.parse::<u32>().ok());
    let digits = |a: &str| a.trim_end_matches(|c: char| !c.is_ascii_digit()).parse::<u32>().ok();
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-lineinfo", "-fatbin", "-o"]).arg(image).arg(source);
    let mut any = false;
    for arch in archs {
        let number =
            digits(arch).ok_or(format!("INDEXCACHE_CUDA_ARCHS: `{arch}` is no architecture"))?;
        if only.is_none_or(|n| n == number) {
            command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
            any = true;
        }
    }
    if only.is_none() {
        // The same bits as the CPU backend: a sum of products is rounded as it is written.
        command.args(["-fmad=false", "-gencode=arch=compute_80,code=compute_80"]);
        any = true;
    }
    Ok(any.then_some((command, only)))
}

/// Runs the compilers, as many at a time as cargo allows.
fn run(commands: Vec<Command>) -> Result<(), String> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let queue = std::sync::Mutex::new(commands);
    let next = || queue.lock().ok().and_then(|mut q| q.pop());
    let work = || -> Result<(), String> {
        while let Some(mut command) = next() {
            let done = command.output().map_err(|e| format!("{command:?}: {e}"))?;
            if !done.status.success() {
                let text = String::from_utf8_lossy(&done.stderr).replace('\n', "\ncargo:warning=");
                return Err(format!("{command:?} failed: {text}"));
            }
        }
        Ok(())
    };
    std::thread::scope(|s| {
        let workers: Vec<_> = (0..jobs).map(|_| s.spawn(work)).collect();
        workers.into_iter().try_for_each(|w| w.join().map_err(|_| "a compiler thread panicked")?)
    })
}

/// nvcc in `CUDA_HOME`, on `PATH`, or in the Python wheel.
fn find_nvcc() -> Option<PathBuf> {
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|p| p.join("nvcc"));
    home.into_iter().chain(on_path).find(|f| f.is_file()).or_else(|| {
        let script = "import importlib.util as u, pathlib\n\
            for root in u.find_spec('nvidia').submodule_search_locations:\n\
            \x20   for nvcc in sorted(pathlib.Path(root).glob('*/bin/nvcc')): print(nvcc)";
        let found = Command::new("python3").args(["-c", script]).output().ok()?;
        let text = String::from_utf8(found.stdout).ok()?;
        text.lines().next().map(PathBuf::from).filter(|f| f.is_file())
    })
}
