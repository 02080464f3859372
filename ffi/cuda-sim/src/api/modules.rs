//! Modules of PTX, of which only the names of the entries are looked at, and launches of kernels that are known.

use std::sync::Arc;

use super::{call, exported, submit};
use crate::abi::{Answer, Arguments, Code, In, InText, Out};
use crate::kernels::{self, Launch};
use crate::work::Work;

/// Threads of a block, blocks in y and z: limits of all devices. In x there is none below the type's.
const THREADS_MAX: u64 = 1024;
const BLOCKS_YZ_MAX: u32 = 65_535;

/// Whether a text of PTX has an entry of this name.
fn has_entry(text: &str, name: &str) -> bool {
    text.split(".entry").skip(1).any(|rest| {
        let rest = rest.trim_start().strip_prefix(name);
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$'))
    })
}

fn load(name: &'static str, module: Out<usize>, image: InText) -> Code {
    call(name, |sim| {
        let context = sim.usable()?;
        // What is not text is code for a real GPU.
        let text = image.get()?;
        if !text.contains(".version") || !text.contains(".target") {
            return Err(Code::INVALID_IMAGE);
        }
        if module.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let handle = sim.handle() as usize;
        sim.handles().modules.insert(handle, (context.device.index, Arc::from(text)));
        module.put(handle)
    })
}

/// A launch whose sizes no device refuses.
fn sizes(grid: [u32; 3], block: [u32; 3]) -> Answer {
    let threads = block.iter().try_fold(1u64, |product, side| product.checked_mul(u64::from(*side)));
    let fits = threads.is_some_and(|threads| (1..=THREADS_MAX).contains(&threads));
    if !fits || grid.contains(&0) || grid[1..].iter().any(|side| *side > BLOCKS_YZ_MAX) {
        return Err(Code::INVALID_VALUE);
    }
    Ok(())
}

exported! {
    fn cuModuleLoadData(module: Out<usize>, image: InText) {
        load("cuModuleLoadData", module, image)
    }

    fn cuModuleLoadDataEx(
        module: Out<usize>,
        image: InText,
        _count: u32,
        _options: In<u32>,
        _values: In<usize>,
    ) {
        // The options are of the compiler, and nothing is compiled.
        load("cuModuleLoadDataEx", module, image)
    }

    fn cuModuleUnload(module: usize) {
        call("cuModuleUnload", |sim| {
            let mut handles = sim.handles();
            handles.modules.remove(&module).ok_or(Code::INVALID_HANDLE)?;
            handles.functions.retain(|_, (owner, _)| *owner != module);
            Ok(())
        })
    }

    fn cuModuleGetFunction(function: Out<usize>, module: usize, name: InText) {
        call("cuModuleGetFunction", |sim| {
            let name = name.get()?;
            let text = sim.handles().modules.get(&module).map(|(_, text)| Arc::clone(text));
            if !has_entry(&text.ok_or(Code::INVALID_HANDLE)?, name) {
                return Err(Code::NOT_FOUND);
            }
            if function.is_null() {
                return Err(Code::INVALID_VALUE);
            }
            let handle = sim.handle() as usize;
            sim.handles().functions.insert(handle, (module, kernels::find(name)));
            function.put(handle)
        })
    }

    fn cuLaunchKernel(
        function: usize,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        _shared_bytes: u32,
        stream: usize,
        arguments: Arguments,
        extra: In<usize>,
    ) {
        submit("cuLaunchKernel", stream, |sim, context, stream| {
            let (_, kernel) = *sim.handles().functions.get(&function).ok_or(Code::INVALID_HANDLE)?;
            let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
            sizes(grid, block)?;
            // Only what has been written for the CPU can be run, with its arguments handed in one by one.
            let kernel = kernel.filter(|_| extra.is_null()).ok_or(Code::NOT_SUPPORTED)?;
            if block.iter().product::<u32>() > kernel.threads_max {
                return Err(Code::INVALID_VALUE);
            }
            let launch = Launch { grid, block, arguments: arguments.get(kernel.arguments)? };
            context.submit(stream, Work::Launch(kernel, launch), Vec::new()).map(|_| ())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_by_their_whole_name() {
        let text = ".visible .entry\n\tfirst_one(.param .u64 a)\n.entry second {";
        assert!(has_entry(text, "first_one") && has_entry(text, "second"));
        assert!(!has_entry(text, "first") && !has_entry(text, "param"));
    }

    #[test]
    fn sizes_that_no_device_takes_are_refused() {
        assert_eq!(sizes([1, 1, 1], [1024, 1, 1]), Ok(()));
        for (grid, block) in [([0, 1, 1], [1; 3]), ([1; 3], [1025, 1, 1]), ([1; 3], [u32::MAX; 3])] {
            assert_eq!(sizes(grid, block), Err(Code::INVALID_VALUE));
        }
    }
}
