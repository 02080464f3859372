//! The name by which programs find the shared library at run time. Its number changes when the ABI breaks.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,liblodestream.so.0");
    println!("cargo::rerun-if-changed=build.rs");
}
