//! Modules and kernels: a module is PTX, of which only the names of its entries are read.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;

use super::{export, give, healthy, stream, take};
use crate::code::{self, Outcome};
use crate::kernels::{self, Kernel};
use crate::machine::machine;
use crate::stream::Handles;

static MODULES: Handles<String> = Handles::new();
static FUNCTIONS: Handles<Kernel> = Handles::new();

fn text<'a>(start: *const c_char) -> Outcome<&'a str> {
    if start.is_null() {
        return Err(code::INVALID_VALUE);
    }
    // SAFETY: not null, and a text with a zero at its end by the API's contract.
    unsafe { CStr::from_ptr(start) }.to_str().map_err(|_| code::INVALID_IMAGE)
}

fn load(module: *mut usize, image: *const c_void) -> Outcome {
    healthy()?;
    let ptx = text(image.cast())?;
    if !ptx.contains(".entry") {
        return Err(code::INVALID_IMAGE);
    }
    give(module, MODULES.put(machine()?.number(), Arc::new(ptx.to_owned())))
}

export! {
    fn cuModuleLoadData(module: *mut usize, image: *const c_void) { load(module, image) }

    fn cuModuleLoadDataEx(
        module: *mut usize,
        image: *const c_void,
        _count: u32,
        _options: *mut c_void,
        _values: *mut c_void,
    ) {
        load(module, image)
    }

    fn cuModuleUnload(module: usize) { MODULES.take(module).map(drop).ok_or(code::INVALID_HANDLE) }

    fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) {
        healthy()?;
        let ptx = MODULES.get(module).ok_or(code::INVALID_HANDLE)?;
        let name = text(name)?;
        let there = ptx.split(".entry").skip(1).any(|rest| {
            rest.trim_start().strip_prefix(name).is_some_and(|rest| rest.trim_start().starts_with('('))
        });
        let kernel = kernels::find(name).filter(|_| there).ok_or(code::NOT_FOUND)?;
        give(function, FUNCTIONS.put(machine()?.number(), Arc::new(kernel)))
    }

    fn cuLaunchKernel(
        function: usize,
        _grid_x: u32,
        _grid_y: u32,
        _grid_z: u32,
        _block_x: u32,
        _block_y: u32,
        _block_z: u32,
        _shared_bytes: u32,
        on: usize,
        parameters: *mut *mut c_void,
        _extra: *mut *mut c_void,
    ) {
        healthy()?;
        let kernel = *FUNCTIONS.get(function).ok_or(code::INVALID_HANDLE)?;
        let mut arguments = [0u64; 4];
        for (number, argument) in arguments.iter_mut().enumerate() {
            let place = take(parameters.cast_const().wrapping_add(number))?;
            *argument = take(place.cast_const().cast())?;
        }
        stream(on)?.push(move || kernel(arguments));
        Ok(())
    }
}
