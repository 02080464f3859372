//! JSON's values as Python's and back: what the API's types are given and shown as.

use lodestream::{Code, Error};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use serde_json::{Map, Number, Value};

use crate::error::Failure;

/// How deep lists and dicts may be nested.
const DEPTH_MAX: usize = 16;

/// A reply as dicts, lists, strings, numbers, bools and None.
pub(crate) fn reply<'py>(
    py: Python<'py>,
    reply: &impl serde::Serialize,
) -> Result<Bound<'py, PyAny>, Failure> {
    let value = serde_json::to_value(reply).map_err(|error| Error::new(Code::Internal, error.to_string()))?;
    Ok(to_python(py, &value)?)
}

fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(value) => PyBool::new(py, *value).to_owned().into_any(),
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => number.into_pyobject(py)?.into_any(),
            (None, Some(number)) => number.into_pyobject(py)?.into_any(),
            (None, None) => PyFloat::new(py, number.as_f64().unwrap_or(f64::NAN)).into_any(),
        },
        Value::String(text) => PyString::new(py, text).into_any(),
        Value::Array(items) => {
            let items = items.iter().map(|item| to_python(py, item)).collect::<PyResult<Vec<_>>>()?;
            PyList::new(py, items)?.into_any()
        }
        Value::Object(members) => {
            let dict = PyDict::new(py);
            for (name, value) in members {
                dict.set_item(name, to_python(py, value)?)?;
            }
            dict.into_any()
        }
    })
}

/// What a caller gave, as JSON; the API's types decide whether it makes sense.
pub(crate) fn from_python(object: &Bound<'_, PyAny>) -> PyResult<Value> {
    nested(object, DEPTH_MAX)
}

fn nested(object: &Bound<'_, PyAny>, depth: usize) -> PyResult<Value> {
    let deeper = |item: &Bound<'_, PyAny>| match depth.checked_sub(1) {
        Some(depth) => nested(item, depth),
        None => Err(PyTypeError::new_err("lists and dicts are nested too deep")),
    };
    if object.is_none() {
        Ok(Value::Null)
    } else if let Ok(value) = object.cast::<PyBool>() {
        Ok(Value::Bool(value.is_true()))
    } else if let Ok(text) = object.cast::<PyString>() {
        Ok(Value::String(text.extract()?))
    } else if let Ok(integer) = object.cast::<PyInt>() {
        match integer.extract::<u64>() {
            Ok(number) => Ok(number.into()),
            Err(_) => Ok(integer.extract::<i64>()?.into()),
        }
    } else if let Ok(float) = object.cast::<PyFloat>() {
        let number = Number::from_f64(float.value());
        number.map(Value::Number).ok_or_else(|| PyTypeError::new_err("a number is not finite"))
    } else if let Ok(dict) = object.cast::<PyDict>() {
        let mut members = Map::new();
        for (name, value) in dict {
            members.insert(name.extract()?, deeper(&value)?);
        }
        Ok(Value::Object(members))
    } else if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
        let items = object.try_iter()?.map(|item| deeper(&item?));
        Ok(Value::Array(items.collect::<PyResult<_>>()?))
    } else {
        let kind = object.get_type().name()?;
        Err(PyTypeError::new_err(format!("{kind} has no meaning here")))
    }
}

/// Reads an optional argument as one of the API's types.
pub(crate) fn argument<T: serde::de::DeserializeOwned>(
    name: &str,
    object: Option<&Bound<'_, PyAny>>,
) -> Result<Option<T>, Failure> {
    let Some(object) = object.filter(|object| !object.is_none()) else { return Ok(None) };
    let value = from_python(object)?;
    let read = serde_json::from_value(value)
        .map_err(|error| Error::new(Code::ApiBadParams, format!("{name}: {error}")))?;
    Ok(Some(read))
}
