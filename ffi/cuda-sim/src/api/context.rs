//! Contexts: retained, made current, waited for.

use super::{call, exported};
use crate::abi::{Code, Out};

exported! {
    fn cuDevicePrimaryCtxRetain(context: Out<usize>, device: i32) {
        call("cuDevicePrimaryCtxRetain", |sim| {
            let device = sim.device(device)?;
            device.touch()?;
            if context.is_null() {
                return Err(Code::INVALID_VALUE);
            }
            context.put(sim.retain(device))
        })
    }

    fn cuDevicePrimaryCtxRelease_v2(device: i32) {
        call("cuDevicePrimaryCtxRelease_v2", |sim| sim.release(sim.device(device)?))
    }

    fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, active: Out<i32>) {
        call("cuDevicePrimaryCtxGetState", |sim| {
            let is_active = sim.is_active(sim.device(device)?);
            flags.put(0).and_then(|()| active.put(i32::from(is_active)))
        })
    }

    fn cuCtxSetCurrent(context: usize) {
        call("cuCtxSetCurrent", |sim| sim.set_current(context))
    }

    fn cuCtxGetCurrent(context: Out<usize>) {
        call("cuCtxGetCurrent", |sim| context.put(sim.current_handle()))
    }

    fn cuCtxGetDevice(device: Out<i32>) {
        call("cuCtxGetDevice", |sim| device.put(sim.current()?.device.index as i32))
    }

    fn cuCtxSynchronize() {
        call("cuCtxSynchronize", |sim| {
            let context = sim.current()?;
            // Work ends before its error is told, also where the error is an old one.
            context.settle();
            context.check()?;
            context.device.touch()
        })
    }

    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        call("cuMemGetInfo_v2", |sim| {
            let context = sim.usable()?;
            let store = &context.device.store;
            let used = store.used().map_err(|_| Code::OPERATING_SYSTEM)?;
            free.put(store.total().saturating_sub(used) as usize)?;
            total.put(store.total() as usize)
        })
    }
}
