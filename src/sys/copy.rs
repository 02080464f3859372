//! Copying to memory that will not be read soon.

/// Copies `source` to `target` without pulling `target` into the CPU's caches, where the CPU can (x86-64 with AVX2 or
/// AVX-512); else as usual. An ordinary copy reads each line of the target before it writes it: with regions of many
/// gigabytes that is a third of the memory traffic for nothing (docs/decisions/0006-landing.md).
///
/// # Panics
/// If the lengths differ.
pub fn streaming(source: &[u8], target: &mut [u8]) {
    assert_eq!(source.len(), target.len(), "lengths differ");
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: any bytes are valid as bytes and as vectors; `align_to_mut` splits where the alignment allows.
        let (head, lines, tail) = unsafe { target.align_to_mut::<Line>() };
        let (first, rest) = source.split_at(head.len());
        let (middle, last) = rest.split_at(size_of_val(lines));
        head.copy_from_slice(first);
        tail.copy_from_slice(last);
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has AVX-512F.
            unsafe { x86::lines_avx512(middle, lines) };
        } else if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2.
            unsafe { x86::lines_avx2(middle, lines) };
        } else {
            for (line, bytes) in lines.iter_mut().zip(middle.chunks_exact(size_of::<Line>())) {
                line.0.copy_from_slice(bytes);
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    target.copy_from_slice(source);
}

/// One cache line.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Line([u8; 64]);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Line;
    use std::arch::x86_64::{
        _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256, _mm512_loadu_si512, _mm512_stream_si512,
    };

    #[target_feature(enable = "avx512f")]
    pub(super) fn lines_avx512(source: &[u8], target: &mut [Line]) {
        for (line, bytes) in target.iter_mut().zip(source.chunks_exact(size_of::<Line>())) {
            // SAFETY: `bytes` has 64 bytes; the load needs no alignment.
            let vector = unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) };
            // SAFETY: a line has 64 bytes and is aligned to 64.
            unsafe { _mm512_stream_si512(line.0.as_mut_ptr().cast(), vector) };
        }
        // Streaming stores are not ordered with later ones: whoever is told of these bytes must see them.
        _mm_sfence();
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn lines_avx2(source: &[u8], target: &mut [Line]) {
        for (line, bytes) in target.iter_mut().zip(source.chunks_exact(size_of::<Line>())) {
            for half in 0..2 {
                // SAFETY: `bytes` has 64 bytes, of which this takes 32; the load needs no alignment.
                let vector = unsafe { _mm256_loadu_si256(bytes.as_ptr().wrapping_add(half * 32).cast()) };
                // SAFETY: a line has 64 bytes and is aligned to 64.
                unsafe { _mm256_stream_si256(line.0.as_mut_ptr().wrapping_add(half * 32).cast(), vector) };
            }
        }
        _mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn copies_what_it_is_given(bytes in prop::collection::vec(any::<u8>(), 0..2000), lead in 0usize..130) {
            let mut target = vec![7u8; lead + bytes.len() + 5];
            super::streaming(&bytes, &mut target[lead..lead + bytes.len()]);
            prop_assert_eq!(&target[lead..lead + bytes.len()], &bytes[..]);
            prop_assert!(target[..lead].iter().chain(&target[lead + bytes.len()..]).all(|byte| *byte == 7));
        }
    }

    #[test]
    fn the_avx2_way_copies_too() {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            let source: Vec<u8> = (0..=255).collect();
            let mut target: Vec<super::Line> = (0..4).map(|_| super::Line([0; 64])).collect();
            // SAFETY: the CPU has AVX2, as was just asked.
            unsafe { super::x86::lines_avx2(&source, &mut target) };
            let got: Vec<u8> = target.iter().flat_map(|line| line.0).collect();
            assert_eq!(got, source);
        }
    }
}
