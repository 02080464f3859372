//! Parameters: set before the driver is opened, told at any time.

use super::{call, exported, library};
use crate::abi::{Code, Status};
use crate::failure::Answer;
use crate::parameters::{Parameters, Slab};
use crate::pointers::{In, InText, Out};

exported! {
    fn cuFileSetParameterSizeT(which: i32, value: usize) -> Status {
        call("cuFileSetParameterSizeT", |_| library().staged()?.set_size(which, value))
    }

    fn cuFileGetParameterSizeT(which: i32, value: Out<usize>) -> Status {
        call("cuFileGetParameterSizeT", |_| value.put(library().parameters().size(which)?))
    }

    // A C `bool` is a byte, of which any value may come.
    fn cuFileSetParameterBool(which: i32, value: u8) -> Status {
        call("cuFileSetParameterBool", |_| library().staged()?.set_boolean(which, value != 0))
    }

    fn cuFileGetParameterBool(which: i32, value: Out<u8>) -> Status {
        call("cuFileGetParameterBool", |_| value.put(library().parameters().boolean(which)?.into()))
    }

    fn cuFileSetParameterString(which: i32, text: InText) -> Status {
        call("cuFileSetParameterString", |_| library().staged()?.set_text(which, text.get()?))
    }

    fn cuFileGetParameterString(which: i32, text: Out<u8>, room: i32) -> Status {
        call("cuFileGetParameterString", |_| {
            let room = usize::try_from(room).map_err(|_| Code::INVALID_VALUE)?;
            let library = library();
            let found = library.parameters().text(which)?;
            if found.len() >= room {
                return Err(Code::INVALID_VALUE.into());
            }
            let bytes = found.bytes().chain([0]).enumerate();
            bytes.into_iter().try_for_each(|(index, byte)| text.put_at(index, byte))
        })
    }

    fn cuFileSetParameterPosixPoolSlabArray(sizes: In<usize>, counts: In<usize>, kinds: i32) -> Status {
        call("cuFileSetParameterPosixPoolSlabArray", |_| {
            let kinds = Parameters::slab_kinds(kinds)?;
            let slab = |index| Ok(Slab { kib: sizes.at(index)?, count: counts.at(index)? });
            let slabs = (0..kinds).map(slab).collect::<Answer<Vec<_>>>()?;
            library().staged()?.set_slabs(slabs);
            Ok(())
        })
    }

    fn cuFileGetParameterPosixPoolSlabArray(sizes: Out<usize>, counts: Out<usize>, kinds: i32) -> Status {
        call("cuFileGetParameterPosixPoolSlabArray", |_| {
            let library = library();
            let slabs = library.parameters().slabs();
            if Parameters::slab_kinds(kinds)? != slabs.len() {
                return Err(Code::INVALID_VALUE.into());
            }
            slabs.iter().enumerate().try_for_each(|(index, slab)| {
                sizes.put_at(index, slab.kib)?;
                counts.put_at(index, slab.count)
            })
        })
    }
}
