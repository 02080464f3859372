//! The planner against a model that moves every byte by hand.

use proptest::prelude::*;

use super::*;
use crate::catalog::Dtype;

const BLOCK: u64 = 1 << 20;
const PART: u64 = 2 << 20;

/// Byte `at` of file `file`.
fn byte(file: u32, at: u64) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 7) as u8 ^ (file as u8).wrapping_mul(37)
}

/// Executes a plan in memory and checks what every plan must hold.
fn execute(layout: &Layout, files: &[u64]) -> (Vec<u8>, Plan) {
    let parts = vec![PART; usize::try_from(layout.bytes.div_ceil(PART)).unwrap()];
    let plan = moves(layout, files, &parts, BLOCK).unwrap();
    let mut region = vec![0u8; parts.len() * PART as usize];
    let mut claimed = vec![false; region.len() / BLOCK_ALIGN as usize];
    let mut checks = 0;
    for step in &plan.moves {
        assert_eq!(step.offset % BLOCK_ALIGN, 0);
        assert_eq!(u64::from(step.read_bytes) % BLOCK_ALIGN, 0);
        assert!(u64::from(step.read_bytes) <= BLOCK && step.read_bytes > 0);
        assert!(step.expect_bytes > 0 && step.expect_bytes <= step.read_bytes);
        let end = step.offset + u64::from(step.expect_bytes);
        assert!(end <= files[step.file as usize], "reads past the end");
        assert!(step.expect_bytes == step.read_bytes || end == files[step.file as usize]);
        assert_eq!(step.first_check, checks);
        let pieces: Vec<_> = step.pieces().collect();
        assert_eq!(pieces.first().unwrap().start, step.offset);
        assert_eq!(pieces.last().unwrap().end, end);
        checks += pieces.len() as u32;
        let bytes: Vec<u8> = (step.offset..end).map(|at| byte(step.file, at)).collect();
        match &step.target {
            Target::Direct { part, offset } => {
                assert!(offset + u64::from(step.read_bytes) <= PART, "crosses a part");
                assert_eq!(offset % BLOCK_ALIGN, 0);
                let start = (u64::from(*part) * PART + offset) as usize;
                region[start..start + bytes.len()].copy_from_slice(&bytes);
                for unit in start..start + step.read_bytes as usize {
                    if unit % BLOCK_ALIGN as usize == 0 {
                        let unit = unit / BLOCK_ALIGN as usize;
                        assert!(!std::mem::replace(&mut claimed[unit], true), "two reads into one block");
                    }
                }
            }
            Target::Staged(_) => {
                for copy in plan.copies_of(step) {
                    carry_out(copy, &bytes, &mut region);
                }
            }
        }
    }
    assert_eq!(plan.checks, checks);
    (region, plan)
}

fn carry_out(copy: &Copy, slot: &[u8], region: &mut [u8]) {
    for row in 0..copy.count {
        let from = (u64::from(copy.slot_offset) + row * copy.stride) as usize;
        let to = (copy.region_offset + row * copy.bytes) as usize;
        let row = &slot[from..from + copy.bytes as usize];
        region[to..to + row.len()].copy_from_slice(row);
    }
}

fn tensor(file: u32, offset: u64, nbytes: u64, element_align: u64) -> Tensor {
    Tensor {
        name: format!("t{offset}"),
        dtype: Dtype::parse("U8").unwrap(),
        element_align,
        shape: vec![nbytes],
        file,
        offset,
        nbytes,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whole_files_arrive_whole(files in prop::collection::vec(0u64..(5 << 20), 1..5)) {
        let layout = layout(&files, &[], None).unwrap();
        let (region, plan) = execute(&layout, &files);
        for (file, bytes) in files.iter().enumerate() {
            let place = layout.files[file].unwrap();
            for at in (0..*bytes).step_by(509).chain(bytes.checked_sub(1)) {
                prop_assert_eq!(region[(place + at) as usize], byte(file as u32, at));
            }
        }
        let direct = plan.moves.iter().all(|step| matches!(step.target, Target::Direct { .. }));
        prop_assert!(direct);
        prop_assert_eq!(plan.bytes, files.iter().sum::<u64>());
    }

    #[test]
    fn misaligned_files_are_shifted_by_way_of_slots(header in 1u64..5000, bytes in 1u64..(3 << 20)) {
        let files = [header + bytes * 4];
        let tensors = [tensor(0, header, bytes * 4, 4)];
        let layout = layout(&files, &tensors, None).unwrap();
        prop_assert_eq!(layout.tensors[0].offset % 4, 0);
        let (region, _) = execute(&layout, &files);
        let place = layout.tensors[0].offset;
        for at in (0..bytes * 4).step_by(509) {
            prop_assert_eq!(region[(place + at) as usize], byte(0, header + at));
        }
    }

    #[test]
    fn picks_arrive_and_are_aligned(
        pieces in prop::collection::vec((0u64..40_000, 1u64..300_000, 1u64..5, 0u64..40_000, any::<bool>()), 1..12)
    ) {
        // Tensors one behind the other with gaps; each is picked whole or row by row.
        let (mut tensors, mut picks, mut at) = (Vec::new(), Vec::new(), 8u64);
        for (gap, bytes, count, stride_gap, odd) in pieces {
            at += gap;
            let stride = bytes + stride_gap;
            let align = if odd { 4 } else { 1 };
            tensors.push(tensor(0, at, stride * count, align));
            let runs = Runs { offset: at, bytes, stride: if count == 1 { bytes } else { stride }, count };
            picks.push(Pick { tensor: tensors.len() - 1, shape: vec![bytes * count], runs });
            at += stride * count;
        }
        let files = [at + 77];
        let layout = layout(&files, &tensors, Some(&picks)).unwrap();
        let (region, plan) = execute(&layout, &files);
        for (pick, placed) in picks.iter().zip(&layout.tensors) {
            prop_assert_eq!(placed.offset % tensors[pick.tensor].element_align, 0);
            for row in 0..pick.runs.count {
                for byte_at in (0..pick.runs.bytes).step_by(509).chain([pick.runs.bytes - 1]) {
                    let here = region[(placed.offset + row * pick.runs.bytes + byte_at) as usize];
                    prop_assert_eq!(here, byte(0, pick.runs.offset + row * pick.runs.stride + byte_at));
                }
            }
        }
        // Only the wanted ranges, rounded to blocks, and gaps that are cheaper to read than to skip.
        let rows: u64 = picks.iter().map(|pick| pick.runs.count).sum();
        let wanted: u64 = picks.iter().map(|pick| pick.runs.count * pick.runs.bytes).sum();
        let slots: u64 = plan.moves.len() as u64;
        prop_assert!(plan.bytes <= wanted + rows * (moves::GAP_BYTES_MAX + 2 * BLOCK_ALIGN) + slots * 2 * BLOCK_ALIGN);
    }
}

#[test]
fn neighbours_share_a_block_and_are_read_once() {
    let tensors: Vec<_> = (0..8).map(|index| tensor(0, 64 + index * 1000, 1000, 1)).collect();
    let picks: Vec<_> = (0..8)
        .map(|tensor| Pick {
            tensor,
            shape: vec![1000],
            runs: Runs { offset: 64 + tensor as u64 * 1000, bytes: 1000, stride: 1000, count: 1 },
        })
        .collect();
    let layout = layout(&[8064], &tensors, Some(&picks)).unwrap();
    let (_, plan) = execute(&layout, &[8064]);
    assert_eq!(plan.moves.len(), 1);
    assert_eq!(plan.bytes, 8064);
}

#[test]
fn absurd_sizes_are_refused_not_wrapped() {
    assert_eq!(layout(&[u64::MAX, u64::MAX], &[], None), None);
    let one = layout(&[3 << 20], &[], None).unwrap();
    assert_eq!(moves(&one, &[3 << 20], &[PART], BLOCK), None, "parts too small");
}

/// Fills the regions of `layouts` by one plan, and checks what every such plan must hold.
fn execute_scatter(layouts: &[Layout], files: &[u64]) -> (Vec<Vec<u8>>, Plan) {
    let plan = scatter(layouts, files, &Direct::default(), BLOCK).unwrap();
    let mut regions: Vec<Vec<u8>> =
        layouts.iter().map(|layout| vec![0; usize::try_from(layout.bytes).unwrap()]).collect();
    let mut last = (0, 0);
    for step in &plan.moves {
        let end = step.offset + u64::from(step.expect_bytes);
        assert!(step.offset % BLOCK_ALIGN == 0 && u64::from(step.read_bytes) % BLOCK_ALIGN == 0);
        assert!(u64::from(step.read_bytes) <= BLOCK && end <= files[step.file as usize]);
        assert!((step.file, step.offset) >= last, "a byte is read twice");
        last = (step.file, end);
        let slot: Vec<u8> = (step.offset..end).map(|at| byte(step.file, at)).collect();
        for copy in plan.copies_of(step) {
            carry_out(copy, &slot, &mut regions[copy.region as usize]);
        }
    }
    (regions, plan)
}

fn bytes_of(file: u32, runs: &Runs) -> Vec<u8> {
    let rows = (0..runs.count).map(|row| runs.offset + row * runs.stride);
    rows.flat_map(|start| (start..start + runs.bytes).map(move |at| byte(file, at))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn tensors_for_a_gpu_are_aligned_and_whole_and_the_header_is_read(
        sizes in prop::collection::vec(0u64..(3 << 20), 1..6), header in 8u64..5000, plain in 0u64..(2 << 20)
    ) {
        let mut offset = header;
        let tensors: Vec<_> = sizes.iter().map(|nbytes| {
            offset += nbytes;
            tensor(0, offset - nbytes, *nbytes, 1)
        }).collect();
        let files = [offset, plain];
        let layout = packed(&files, &tensors, None).unwrap();
        let (regions, plan) = execute_scatter(std::slice::from_ref(&layout), &files);
        prop_assert_eq!(plan.bytes, offset + plain);
        for (placed, tensor) in layout.tensors.iter().zip(&tensors) {
            prop_assert_eq!(placed.offset % TENSOR_ALIGN, 0);
            let runs = Runs { offset: tensor.offset, bytes: tensor.nbytes, stride: tensor.nbytes, count: 1 };
            let range = placed.offset as usize..(placed.offset + placed.nbytes) as usize;
            prop_assert!(regions[0][range] == bytes_of(0, &runs)[..]);
        }
        let place = layout.files[1].unwrap() as usize;
        let plain_runs = Runs { offset: 0, bytes: plain, stride: plain, count: 1 };
        let found = &regions[0][place..place + plain as usize];
        prop_assert!(found == &bytes_of(1, &plain_runs)[..]);
        prop_assert_eq!(layout.files[0], None);
    }

    #[test]
    fn ranks_get_their_slices_from_one_read_of_each_byte(
        ranks in 1u64..5, rows in 1u64..400, row_bytes in 1u64..9000, offset in 0u64..10_000, only in 0u64..5
    ) {
        // Each rank wants its part of every row: cut along the inner dimension.
        let whole = row_bytes * ranks;
        let file = offset + rows * whole;
        let tensors = [tensor(0, offset, rows * whole, 1)];
        let layouts: Vec<_> = (0..ranks).filter(|rank| only == 0 || rank % only == 0).map(|rank| {
            let runs = Runs { offset: offset + rank * row_bytes, bytes: row_bytes, stride: whole, count: rows };
            let pick = Pick { tensor: 0, shape: vec![rows, row_bytes], runs: runs.clone() };
            (packed(&[file], &tensors, Some(&[pick])).unwrap(), runs)
        }).collect();
        let (layouts, runs): (Vec<_>, Vec<_>) = layouts.into_iter().unzip();
        let (regions, plan) = execute_scatter(&layouts, &[file]);
        prop_assert!(plan.bytes <= file);
        for ((layout, region), runs) in layouts.iter().zip(&regions).zip(&runs) {
            let place = layout.tensors[0].offset as usize;
            prop_assert!(region[place..][..(rows * row_bytes) as usize] == bytes_of(0, runs)[..]);
        }
    }
}

/// Carries out what of `layouts` goes directly and the rest by slots; → the regions, and how often each byte of the files was
/// read.
fn execute_direct(layouts: &[Layout], files: &[u64], missed: bool) -> (Vec<Vec<u8>>, Vec<Vec<u8>>, Direct) {
    let direct = direct(layouts, files.len(), |_, _| true).unwrap();
    let mut plans = vec![scatter(layouts, files, &direct, BLOCK).unwrap()];
    let mut regions: Vec<Vec<u8>> =
        layouts.iter().map(|layout| vec![0; usize::try_from(layout.bytes).unwrap()]).collect();
    let mut read: Vec<Vec<u8>> = files.iter().map(|bytes| vec![0; *bytes as usize]).collect();
    if missed {
        let all: Vec<u32> = (0..direct.reads.len() as u32).collect();
        let again = direct.by_slots(&all, files, BLOCK).unwrap();
        assert_eq!(again.copies.len(), direct.pieces.len());
        plans.push(again);
    }
    for plan in &plans {
        for step in &plan.moves {
            let end = step.offset + u64::from(step.expect_bytes);
            read[step.file as usize][step.offset as usize..end as usize].iter_mut().for_each(|n| *n += 1);
            let slot: Vec<u8> = (step.offset..end).map(|at| byte(step.file, at)).collect();
            for copy in plan.copies_of(step) {
                carry_out(copy, &slot, &mut regions[copy.region as usize]);
            }
        }
    }
    for one in direct.reads.iter().filter(|_| !missed) {
        assert!([one.offset, one.place, one.bytes].iter().all(|number| number % BLOCK_ALIGN == 0));
        assert!(one.bytes <= DIRECT_BYTES_MAX && one.range().end <= files[one.file as usize]);
        let mut at = one.offset;
        for piece in direct.pieces_of(one) {
            assert_eq!((piece.offset, piece.place - one.place), (at, at - one.offset));
            let chunk = CHUNK_BYTES;
            assert_eq!(piece.offset / chunk, (piece.offset + piece.bytes - 1) / chunk, "one chunk");
            at += piece.bytes;
        }
        assert_eq!(at, one.range().end);
        read[one.file as usize][one.offset as usize..at as usize].iter_mut().for_each(|n| *n += 1);
        let bytes: Vec<u8> = (one.offset..at).map(|at| byte(one.file, at)).collect();
        regions[one.region as usize][one.place as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    (regions, read, direct)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_agrees_goes_directly_and_everything_arrives_once(
        sizes in prop::collection::vec((1u64..(2 << 20), 0u64..3, 0u64..3000), 1..7), header in 1u64..20,
        aligned: bool, missed: bool
    ) {
        // Tensors on multiples of 512 bytes or anywhere, some with gaps between them.
        let mut at = if aligned { header * 512 } else { header * 8 };
        let tensors: Vec<_> = sizes.iter().map(|(bytes, kind, gap)| {
            let bytes = if *kind > 0 { bytes.next_multiple_of(512) } else { *bytes };
            let gap = if *kind == 2 { gap - gap % 512 } else { 0 };
            at += gap + bytes;
            tensor(0, at - bytes, bytes, 1)
        }).collect();
        let files = [at + 100];
        let layout = packed(&files, &tensors, None).unwrap();
        let (regions, read, direct) = execute_direct(std::slice::from_ref(&layout), &files, missed);
        prop_assert!(read[0].iter().all(|times| *times == 1), "each byte is read once");
        for (placed, tensor) in layout.tensors.iter().zip(&tensors) {
            prop_assert_eq!(placed.offset % TENSOR_ALIGN, 0);
            let runs = Runs { offset: tensor.offset, bytes: tensor.nbytes, stride: tensor.nbytes, count: 1 };
            let range = placed.offset as usize..(placed.offset + placed.nbytes) as usize;
            prop_assert!(regions[0][range] == bytes_of(0, &runs)[..]);
            // All but the edges of what begins on a multiple of 512 goes directly.
            if tensor.offset % 512 == 0 && tensor.nbytes >= DIRECT_BYTES_MIN + 2 * BLOCK_ALIGN {
                let inside = |read: &DirectRead| {
                    let (start, end) = (tensor.offset, tensor.offset + tensor.nbytes);
                    read.range().end.min(end).saturating_sub(read.offset.max(start))
                };
                let bytes: u64 = direct.reads.iter().map(inside).sum();
                prop_assert!(bytes + 2 * BLOCK_ALIGN > tensor.nbytes);
            }
            // A piece is of one tensor.
            for piece in &direct.pieces {
                let (start, end) = (piece.place, piece.place + piece.bytes);
                let (first, last) = (placed.offset, placed.offset + placed.nbytes);
                prop_assert!(end <= first || start >= last || (start >= first && end <= last));
            }
        }
    }
}

#[test]
fn what_several_ranks_want_is_read_once_and_by_slots() {
    let tensors = [tensor(0, 4096, 2 << 20, 1), tensor(0, 4096 + (2 << 20), 2 << 20, 1)];
    let files = [4096 + (4 << 20)];
    let pick = |index: usize| {
        let tensor: &Tensor = &tensors[index];
        let runs = Runs { offset: tensor.offset, bytes: tensor.nbytes, stride: tensor.nbytes, count: 1 };
        Pick { tensor: index, shape: vec![tensor.nbytes], runs }
    };
    let both = packed(&files, &tensors, Some(&[pick(0), pick(1)])).unwrap();
    let second = packed(&files, &tensors, Some(&[pick(1)])).unwrap();
    let (_, read, direct) = execute_direct(&[both, second], &files, false);
    assert_eq!(direct.bytes(), 2 << 20);
    assert!(direct.reads.iter().all(|read| read.region == 0 && read.range().end <= 4096 + (2 << 20)));
    assert!(read[0][4096..].iter().all(|times| *times == 1));
}
