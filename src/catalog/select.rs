//! Which tensors, and which byte ranges of them, a request selects. Pure.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use super::{Tensor, elements};
use crate::api::methods::{Selector, SliceSelector};
use crate::error::Code;
use crate::json::shown;

/// Selectors of one request.
const SELECTORS_MAX: usize = 4096;
/// Length of one glob, bytes.
const GLOB_BYTES_MAX: usize = 1024;

/// Why a selection cannot be made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too many selectors.
    #[error("the request has {selectors} selectors, more than the limit of {SELECTORS_MAX}")]
    TooMany {
        /// How many.
        selectors: usize,
    },
    /// A pattern that is no glob.
    #[error("'{}' is not a glob: {why}", shown(glob))]
    BadGlob {
        /// The pattern.
        glob: String,
        /// Why.
        why: String,
    },
    /// The globs are too much together.
    #[error("the globs of the request are too large together: {why}")]
    GlobsTooLarge {
        /// Why.
        why: String,
    },
    /// A glob that no tensor matches.
    #[error("no tensor matches '{}'", shown(glob))]
    NoMatch {
        /// The pattern.
        glob: String,
    },
    /// A slice that cannot be cut.
    #[error("'{}' cannot be cut: {why}", shown(tensor))]
    BadSlice {
        /// The tensor, or the glob.
        tensor: String,
        /// Why.
        why: String,
    },
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::TooMany { .. } => Code::SelectTooMany,
            Error::BadGlob { .. } | Error::GlobsTooLarge { .. } => Code::SelectBadGlob,
            Error::NoMatch { .. } => Code::SelectNoMatch,
            Error::BadSlice { .. } => Code::SelectBadSlice,
        };
        crate::Error::new(code, error.to_string())
    }
}

/// A tensor, or a part of one, that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pick {
    /// Index into the tensors.
    pub tensor: usize,
    /// Shape of the part.
    pub shape: Vec<u64>,
    /// Where its bytes are.
    pub runs: Runs,
}

/// Equal byte ranges at equal distances in one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runs {
    /// Where the first one starts, bytes from the start of the file.
    pub offset: u64,
    /// Length of each, bytes.
    pub bytes: u64,
    /// From the start of one to the start of the next, bytes; `bytes` if there is only one.
    pub stride: u64,
    /// How many; at least one.
    pub count: u64,
}

impl Runs {
    fn one(offset: u64, bytes: u64) -> Runs {
        Runs { offset, bytes, stride: bytes, count: 1 }
    }
}

/// What `select` picks of `tensors`, in their order; everything if it is absent. For a tensor that several selectors
/// match, the first counts. In a glob, `*` matches any characters, also dots and slashes.
///
/// # Errors
/// [`Error`]: also if a selector matches nothing, or a slice does not divide a tensor evenly or falls
/// within a byte or a block of its elements.
pub fn pick(tensors: &[Tensor], select: Option<&[Selector]>) -> Result<Vec<Pick>, Error> {
    let Some(select) = select else {
        return Ok(tensors.iter().enumerate().map(|(number, tensor)| whole(number, tensor)).collect());
    };
    let globs = compile(select)?;
    let mut matched = vec![false; select.len()];
    let mut picks = Vec::new();
    let mut matching = Vec::new();
    for (number, tensor) in tensors.iter().enumerate() {
        globs.matches_into(&tensor.name, &mut matching);
        matching.iter().for_each(|selector| matched[*selector] = true);
        // In the order of the request: the numbers come sorted.
        match matching.first().map(|first| &select[*first]) {
            None => {}
            Some(Selector::Glob(_)) => picks.push(whole(number, tensor)),
            Some(Selector::Slice(slice)) => picks.push(cut(number, tensor, slice)?),
        }
    }
    match matched.iter().position(|matched| !matched) {
        Some(selector) => Err(Error::NoMatch { glob: glob_of(&select[selector]).to_owned() }),
        None => Ok(picks),
    }
}

fn glob_of(selector: &Selector) -> &str {
    match selector {
        Selector::Glob(glob) => glob,
        Selector::Slice(slice) => &slice.name,
    }
}

fn compile(select: &[Selector]) -> Result<GlobSet, Error> {
    if select.len() > SELECTORS_MAX {
        return Err(Error::TooMany { selectors: select.len() });
    }
    let mut globs = GlobSetBuilder::new();
    for selector in select {
        let glob = glob_of(selector);
        let bad = |why: String| Error::BadGlob { glob: glob.to_owned(), why };
        if glob.len() > GLOB_BYTES_MAX {
            return Err(bad(format!("it has more than {GLOB_BYTES_MAX} bytes")));
        }
        let built = GlobBuilder::new(glob).literal_separator(false).build();
        globs.add(built.map_err(|error| bad(error.kind().to_string()))?);
    }
    globs.build().map_err(|error| Error::GlobsTooLarge { why: error.to_string() })
}

fn whole(number: usize, tensor: &Tensor) -> Pick {
    Pick { tensor: number, shape: tensor.shape.clone(), runs: Runs::one(tensor.offset, tensor.nbytes) }
}

fn cut(number: usize, tensor: &Tensor, slice: &SliceSelector) -> Result<Pick, Error> {
    let bad = |why: String| Error::BadSlice { tensor: tensor.name.clone(), why };
    let SliceSelector { dim, of, index, .. } = *slice;
    if index >= of {
        return Err(bad(format!("part {index} of {of} does not exist (they count from 0)")));
    }
    let at = usize::try_from(dim).ok().filter(|at| *at < tensor.shape.len());
    let at =
        at.ok_or_else(|| bad(format!("it has {} dimensions, no dimension {dim}", tensor.shape.len())))?;
    let full = tensor.shape[at];
    if !full.is_multiple_of(of) {
        return Err(bad(format!("dimension {dim} has {full} elements, which {of} does not divide")));
    }
    let part = full / of;
    let mut shape = tensor.shape.clone();
    shape[at] = part;
    if of == 1 || tensor.nbytes == 0 {
        return Ok(Pick { tensor: number, shape, runs: Runs::one(tensor.offset, tensor.nbytes) });
    }
    // All of this is at most the tensor's own number of elements or bytes, or the end of its file.
    let overflow = || bad("its size overflows".to_owned());
    let inner = elements(&tensor.shape[at + 1..]).ok_or_else(overflow)?;
    let count = elements(&tensor.shape[..at]).ok_or_else(overflow)?;
    let bytes =
        part.checked_mul(inner).and_then(|elements| tensor.dtype.bytes_of(elements)).ok_or_else(|| {
            bad(format!(
                "{part} of {full} elements of dimension {dim} are no whole blocks of {}",
                tensor.dtype.as_str()
            ))
        })?;
    let stride = bytes.checked_mul(of).ok_or_else(overflow)?;
    let offset =
        index.checked_mul(bytes).and_then(|skip| tensor.offset.checked_add(skip)).ok_or_else(overflow)?;
    let runs = if count == 1 { Runs::one(offset, bytes) } else { Runs { offset, bytes, stride, count } };
    Ok(Pick { tensor: number, shape, runs })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Dtype;
    use proptest::prelude::*;

    fn tensor(name: &str, dtype: Dtype, shape: &[u64]) -> Tensor {
        let nbytes = dtype.bytes_of(shape.iter().product()).unwrap();
        let (name, shape) = (name.to_owned(), shape.to_vec());
        Tensor { name, dtype, element_align: dtype.align(), shape, file: 0, offset: 1000, nbytes }
    }

    fn glob(glob: &str) -> Selector {
        Selector::Glob(glob.to_owned())
    }

    fn slice(name: &str, dim: u32, of: u64, index: u64) -> Selector {
        Selector::Slice(SliceSelector { name: name.to_owned(), dim, of, index })
    }

    fn names(tensors: &[Tensor], select: &[Selector]) -> Vec<String> {
        let picks = pick(tensors, Some(select)).unwrap();
        picks.iter().map(|pick| tensors[pick.tensor].name.clone()).collect()
    }

    fn code(tensors: &[Tensor], select: &[Selector]) -> Code {
        crate::Error::from(pick(tensors, Some(select)).unwrap_err()).code
    }

    #[test]
    fn globs_pick_whole_tensors_in_file_order() {
        let all: Vec<Tensor> = ["a.b/c.weight", "a.d.bias", "z", "a.b/d.weight."]
            .map(|name| tensor(name, Dtype::F32, &[2]))
            .to_vec();
        assert_eq!(pick(&all, None).unwrap().len(), 4);
        assert_eq!(names(&all, &[glob("*")]).len(), 4);
        assert_eq!(names(&all, &[glob("z"), glob("a*weight*")]), ["a.b/c.weight", "z", "a.b/d.weight."]);
        assert_eq!(names(&all, &[glob("a.?.*")]), ["a.d.bias"]);
        assert_eq!(names(&all, &[glob("{z,*.bias}")]), ["a.d.bias", "z"]);
        assert_eq!(pick(&all, Some(&[glob("z")])).unwrap()[0].runs, Runs::one(1000, 8));
        assert_eq!(names(&all, &[]), Vec::<String>::new());
    }

    #[test]
    fn the_first_selector_counts_and_each_must_match() {
        let all = [tensor("a", Dtype::F32, &[4]), tensor("b", Dtype::F32, &[4])];
        let picks = pick(&all, Some(&[slice("a", 0, 2, 1), glob("*")])).unwrap();
        assert_eq!((picks[0].shape[0], picks[1].shape[0]), (2, 4));
        let picks = pick(&all, Some(&[glob("*"), slice("a", 0, 2, 1)])).unwrap();
        assert_eq!((picks[0].shape[0], picks[1].shape[0]), (4, 4));
        assert_eq!(code(&all, &[glob("*"), glob("c")]), Code::SelectNoMatch);
        assert_eq!(code(&all, &[slice("c", 9, 0, 0)]), Code::SelectNoMatch);
        assert_eq!(code(&[], &[glob("*")]), Code::SelectNoMatch);
    }

    #[test]
    fn what_is_no_glob_is_refused() {
        let all = [tensor("a", Dtype::F32, &[4])];
        for bad in ["[", "{a", &"a".repeat(1025)] {
            assert_eq!(code(&all, &[glob(bad)]), Code::SelectBadGlob, "{bad}");
        }
        assert_eq!(code(&all, &vec![glob("a"); SELECTORS_MAX + 1]), Code::SelectTooMany);
        // Many globs that are each allowed must end in an answer too.
        let _ = pick(&all, Some(&vec![glob(&"{a,[!b]*}".repeat(100)); SELECTORS_MAX]));
    }

    #[test]
    fn slices_name_their_bytes() {
        let all = [tensor("a", Dtype::F16, &[6, 4, 5])];
        let runs = |dim, of, index| pick(&all, Some(&[slice("a", dim, of, index)])).unwrap()[0].clone();
        assert_eq!(runs(0, 3, 2).runs, Runs::one(1000 + 2 * 80, 80));
        assert_eq!(runs(1, 2, 1).runs, Runs { offset: 1020, bytes: 20, stride: 40, count: 6 });
        assert_eq!(runs(1, 2, 1).shape, [6, 2, 5]);
        assert_eq!(runs(2, 5, 4).runs, Runs { offset: 1008, bytes: 2, stride: 10, count: 24 });
        assert_eq!(runs(2, 1, 0).runs, Runs::one(1000, 240));
        let row = [tensor("a", Dtype::F16, &[1, 8])];
        assert_eq!(pick(&row, Some(&[slice("a", 1, 4, 1)])).unwrap()[0].runs, Runs::one(1004, 4));
        let empty = [tensor("a", Dtype::F16, &[0, 8])];
        assert_eq!(pick(&empty, Some(&[slice("a", 1, 4, 1)])).unwrap()[0].runs, Runs::one(1000, 0));
    }

    #[test]
    fn what_cannot_be_cut_is_refused() {
        let all = [tensor("a", Dtype::F32, &[6, 4])];
        for (dim, of, index) in
            [(0, 4, 0), (1, 3, 0), (2, 1, 0), (u32::MAX, 1, 0), (0, 0, 0), (0, 2, 2), (0, 7, 0)]
        {
            assert_eq!(code(&all, &[slice("a", dim, of, index)]), Code::SelectBadSlice, "{dim} {of} {index}");
        }
        let scalar = [tensor("a", Dtype::F32, &[])];
        assert_eq!(code(&scalar, &[slice("a", 0, 1, 0)]), Code::SelectBadSlice);
        // Half a byte, and half a block.
        assert_eq!(code(&[tensor("a", Dtype::F4, &[2, 3])], &[slice("a", 0, 2, 0)]), Code::SelectBadSlice);
        assert_eq!(code(&[tensor("a", Dtype::Q8_0, &[2, 32])], &[slice("a", 1, 2, 0)]), Code::SelectBadSlice);
        assert!(pick(&[tensor("a", Dtype::Q8_0, &[2, 64])], Some(&[slice("a", 1, 2, 0)])).is_ok());
    }

    /// The numbers of the elements of a part, by walking over all elements.
    fn naive(shape: &[u64], dim: usize, of: u64, index: u64) -> Vec<u64> {
        let part = shape[dim] / of;
        let inner: u64 = shape[dim + 1..].iter().product();
        let total: u64 = shape.iter().product();
        (0..total).filter(|element| (element / inner.max(1)) % shape[dim] / part.max(1) == index).collect()
    }

    proptest! {
        #[test]
        fn a_slice_has_the_bytes_of_its_elements(
            outer in proptest::collection::vec(1u64..4, 0..3),
            (of, part) in (1u64..5, 1u64..4),
            inner in proptest::collection::vec(1u64..5, 0..3),
            index in 0u64..5,
            dtype in proptest::sample::select(Dtype::ALL),
        ) {
            prop_assume!(index < of);
            let dim = outer.len();
            let shape: Vec<u64> = [outer, vec![of * part], inner].concat();
            let elements: u64 = shape.iter().product();
            prop_assume!(dtype.bytes_of(elements).is_some());
            let all = [tensor("a", dtype, &shape)];
            let wanted = naive(&shape, dim, of, index);
            match pick(&all, Some(&[slice("a", dim as u32, of, index)])) {
                Ok(picks) => {
                    let runs = &picks[0].runs;
                    let bytes: Vec<u64> = (0..runs.count)
                        .flat_map(|run| runs.offset + run * runs.stride..runs.offset + run * runs.stride + runs.bytes)
                        .collect();
                    // A block is in the part if its first element is; the part must not tear one apart.
                    let expected: Vec<u64> = wanted
                        .iter()
                        .filter(|element| *element % dtype.block_elements() == 0)
                        .flat_map(|element| {
                            let start = 1000 + element / dtype.block_elements() * dtype.block_bytes();
                            start..start + dtype.block_bytes()
                        })
                        .collect();
                    prop_assert_eq!(bytes, expected);
                    prop_assert_eq!(picks[0].shape.iter().product::<u64>(), wanted.len() as u64);
                }
                Err(Error::BadSlice { .. }) => {
                    let torn = |element: &u64| {
                        let block = element - element % dtype.block_elements();
                        !(block..block + dtype.block_elements()).all(|other| wanted.contains(&other))
                    };
                    prop_assert!(wanted.iter().any(torn));
                }
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    }
}
