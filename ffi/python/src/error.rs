//! Errors of the client as `lodestream.LodestreamError`.

use lodestream::{Code, Error};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// What can go wrong here: the client's error, or an exception that Python code has raised.
pub(crate) enum Failure {
    /// Of the client or the daemon.
    Lodestream(Error),
    /// Of a progress function or a signal handler.
    Python(PyErr),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Lodestream(error)
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Failure::Python(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> PyErr {
        match failure {
            Failure::Python(error) => error,
            Failure::Lodestream(error) => Python::attach(|py| raised(py, &error)),
        }
    }
}

fn raised(py: Python<'_>, error: &Error) -> PyErr {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let arguments = (error.code.as_str(), &error.message, error.code.retryable(), &error.kept);
    let class = CLASS.import(py, "lodestream._error", "LodestreamError");
    match class.and_then(|class| class.call1(arguments)) {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}

/// An error with this code.
pub(crate) fn error(code: Code, message: impl Into<String>) -> Failure {
    Failure::Lodestream(Error::new(code, message))
}
