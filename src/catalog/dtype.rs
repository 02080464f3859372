//! The types of tensor elements: those of safetensors 0.8 and those of ggml.
//!
//! A type is described by its smallest whole piece, the block: so many elements in so many bytes. For most types
//! a block is one element; for those of less than a byte, and for ggml's quantised ones, it is several.

/// Name, elements and bytes of a block, alignment, whether safetensors has it, its number in ggml.
struct Facts {
    name: &'static str,
    block_elements: u64,
    block_bytes: u64,
    align: u64,
    safetensors: bool,
    ggml: Option<u32>,
}

macro_rules! dtypes {
    ($($variant:ident = $name:literal, $elements:literal in $bytes:literal, align $align:literal,
       $safetensors:literal, $ggml:expr;)*) => {
        /// The type of a tensor's elements.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, non_camel_case_types, reason = "the names are those of the formats")]
        pub enum Dtype { $($variant,)* }

        impl Dtype {
            /// All types.
            pub const ALL: &[Dtype] = &[$(Dtype::$variant,)*];

            const fn facts(self) -> Facts {
                match self {
                    $(Dtype::$variant => Facts {
                        name: $name,
                        block_elements: $elements,
                        block_bytes: $bytes,
                        align: $align,
                        safetensors: $safetensors,
                        ggml: $ggml,
                    },)*
                }
            }

            /// The type of this name, in either format.
            pub fn parse(name: &str) -> Option<Dtype> {
                match name { $($name => Some(Dtype::$variant),)* _ => None }
            }
        }
    };
}

// Block sizes of ggml: ggml-common.h and the table GGML_QUANT_SIZES of its Python package, version 0.19.
// The alignment of a quantised block is that of the largest number in it.
dtypes! {
    Bool = "BOOL", 1 in 1, align 1, true, None;
    F4 = "F4", 2 in 1, align 1, true, None;
    F6_E2M3 = "F6_E2M3", 4 in 3, align 1, true, None;
    F6_E3M2 = "F6_E3M2", 4 in 3, align 1, true, None;
    U8 = "U8", 1 in 1, align 1, true, None;
    I8 = "I8", 1 in 1, align 1, true, Some(24);
    F8_E5M2 = "F8_E5M2", 1 in 1, align 1, true, None;
    F8_E4M3 = "F8_E4M3", 1 in 1, align 1, true, None;
    F8_E8M0 = "F8_E8M0", 1 in 1, align 1, true, None;
    F8_E4M3Fnuz = "F8_E4M3FNUZ", 1 in 1, align 1, true, None;
    F8_E5M2Fnuz = "F8_E5M2FNUZ", 1 in 1, align 1, true, None;
    I16 = "I16", 1 in 2, align 2, true, Some(25);
    U16 = "U16", 1 in 2, align 2, true, None;
    F16 = "F16", 1 in 2, align 2, true, Some(1);
    Bf16 = "BF16", 1 in 2, align 2, true, Some(30);
    I32 = "I32", 1 in 4, align 4, true, Some(26);
    U32 = "U32", 1 in 4, align 4, true, None;
    F32 = "F32", 1 in 4, align 4, true, Some(0);
    C64 = "C64", 1 in 8, align 8, true, None;
    F64 = "F64", 1 in 8, align 8, true, Some(28);
    I64 = "I64", 1 in 8, align 8, true, Some(27);
    U64 = "U64", 1 in 8, align 8, true, None;
    Q4_0 = "Q4_0", 32 in 18, align 2, false, Some(2);
    Q4_1 = "Q4_1", 32 in 20, align 2, false, Some(3);
    Q5_0 = "Q5_0", 32 in 22, align 2, false, Some(6);
    Q5_1 = "Q5_1", 32 in 24, align 2, false, Some(7);
    Q8_0 = "Q8_0", 32 in 34, align 2, false, Some(8);
    Q8_1 = "Q8_1", 32 in 40, align 4, false, Some(9);
    Q2_K = "Q2_K", 256 in 84, align 2, false, Some(10);
    Q3_K = "Q3_K", 256 in 110, align 2, false, Some(11);
    Q4_K = "Q4_K", 256 in 144, align 2, false, Some(12);
    Q5_K = "Q5_K", 256 in 176, align 2, false, Some(13);
    Q6_K = "Q6_K", 256 in 210, align 2, false, Some(14);
    Q8_K = "Q8_K", 256 in 292, align 4, false, Some(15);
    Iq2Xxs = "IQ2_XXS", 256 in 66, align 2, false, Some(16);
    Iq2Xs = "IQ2_XS", 256 in 74, align 2, false, Some(17);
    Iq3Xxs = "IQ3_XXS", 256 in 98, align 2, false, Some(18);
    Iq1S = "IQ1_S", 256 in 50, align 2, false, Some(19);
    Iq4Nl = "IQ4_NL", 32 in 18, align 2, false, Some(20);
    Iq3S = "IQ3_S", 256 in 110, align 2, false, Some(21);
    Iq2S = "IQ2_S", 256 in 82, align 2, false, Some(22);
    Iq4Xs = "IQ4_XS", 256 in 136, align 2, false, Some(23);
    Iq1M = "IQ1_M", 256 in 56, align 1, false, Some(29);
    Tq1_0 = "TQ1_0", 256 in 54, align 2, false, Some(34);
    Tq2_0 = "TQ2_0", 256 in 66, align 2, false, Some(35);
    Mxfp4 = "MXFP4", 32 in 17, align 1, false, Some(39);
    Nvfp4 = "NVFP4", 64 in 36, align 1, false, Some(40);
    Q1_0 = "Q1_0", 128 in 18, align 2, false, Some(41);
}

impl Dtype {
    /// The name, as its format writes it: `BF16`, `Q4_K`.
    pub const fn as_str(self) -> &'static str {
        self.facts().name
    }

    /// Elements of one block.
    pub const fn block_elements(self) -> u64 {
        self.facts().block_elements
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> u64 {
        self.facts().block_bytes
    }

    /// What the address of an element, or of a block, must be a multiple of.
    pub const fn align(self) -> u64 {
        self.facts().align
    }

    /// Bytes of so many elements; `None` if they are no whole number of blocks, or too many to count.
    pub const fn bytes_of(self, elements: u64) -> Option<u64> {
        let facts = self.facts();
        if !elements.is_multiple_of(facts.block_elements) {
            return None;
        }
        (elements / facts.block_elements).checked_mul(facts.block_bytes)
    }

    /// The type that safetensors calls so.
    pub fn from_safetensors(name: &str) -> Option<Dtype> {
        Dtype::parse(name).filter(|dtype| dtype.facts().safetensors)
    }

    /// The type with this number in ggml.
    pub fn from_ggml(number: u32) -> Option<Dtype> {
        Dtype::ALL.iter().copied().find(|dtype| dtype.facts().ggml == Some(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_unique_and_lead_back() {
        for (place, dtype) in Dtype::ALL.iter().enumerate() {
            assert_eq!(Dtype::parse(dtype.as_str()), Some(*dtype));
            let number = dtype.facts().ggml;
            assert!(number.is_none_or(|number| Dtype::from_ggml(number) == Some(*dtype)));
            assert!(dtype.facts().safetensors || number.is_some());
            assert!(Dtype::ALL[..place].iter().all(|other| other.as_str() != dtype.as_str()));
            assert!(dtype.align().is_power_of_two() && dtype.block_bytes().is_multiple_of(dtype.align()));
        }
        assert_eq!(Dtype::from_safetensors("Q4_K"), None);
        assert_eq!(Dtype::parse("bf16"), None);
        // Numbers that ggml once used and then withdrew.
        for gone in [4, 5, 31, 32, 33, 36, 37, 38, 42, u32::MAX] {
            assert_eq!(Dtype::from_ggml(gone), None, "{gone}");
        }
    }

    #[test]
    fn agrees_with_the_stock_library() {
        use safetensors::Dtype as Stock;
        let stock = [
            Stock::BOOL,
            Stock::F4,
            Stock::F6_E2M3,
            Stock::F6_E3M2,
            Stock::U8,
            Stock::I8,
            Stock::F8_E5M2,
            Stock::F8_E4M3,
            Stock::F8_E8M0,
            Stock::F8_E4M3FNUZ,
            Stock::F8_E5M2FNUZ,
            Stock::I16,
            Stock::U16,
            Stock::F16,
            Stock::BF16,
            Stock::I32,
            Stock::U32,
            Stock::F32,
            Stock::C64,
            Stock::F64,
            Stock::I64,
            Stock::U64,
        ];
        assert_eq!(stock.len(), Dtype::ALL.iter().filter(|dtype| dtype.facts().safetensors).count());
        for stock in stock {
            let own = Dtype::from_safetensors(&stock.to_string()).unwrap();
            assert_eq!(own.bytes_of(24), Some(24 * stock.bitsize() as u64 / 8), "{stock}");
        }
    }

    #[test]
    fn pieces_of_blocks_have_no_size() {
        assert_eq!(Dtype::F4.bytes_of(3), None);
        assert_eq!(Dtype::F6_E2M3.bytes_of(6), None);
        assert_eq!(Dtype::Q4_K.bytes_of(512), Some(288));
        assert_eq!(Dtype::Q4_K.bytes_of(128), None);
        assert_eq!(Dtype::F64.bytes_of(u64::MAX / 8), Some(u64::MAX - 7));
        assert_eq!(Dtype::F64.bytes_of(u64::MAX), None);
    }
}
