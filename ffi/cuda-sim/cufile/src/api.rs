//! The C functions: what of their arguments is checked, and what each does.
//!
//! No panic leaves them, no argument is taken for valid that C allows to be anything, and each counts for fault injection
//! under the name that it is exported by.

mod batch;
mod driver;
mod files;
mod parameters;
mod statistics;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use crate::abi::{Code, Status};
use crate::batch::Batch;
use crate::config::Config;
use crate::device::lock;
use crate::failure::{Answer, Failure};
use crate::fault::Effect;
use crate::parameters::Parameters;
use crate::session::Session;
use crate::statistics::Call;

/// Defines C functions.
macro_rules! exported {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block)*) => {
        $(
            // SAFETY: the name is one of cuFile's API, which this library stands in for; nothing else defines it.
            #[unsafe(no_mangle)]
            #[allow(non_snake_case, reason = "the names are those of the C API")]
            extern "C" fn $name($($argument: $type),*) -> $result $body
        )*
    };
}
use exported;

/// What the process has of cuFile.
#[derive(Default)]
struct Library {
    /// For the next opening.
    staged: Parameters,
    /// `cuFileSetStatsLevel` before the driver was opened.
    level: Option<i32>,
    opened: Option<Opened>,
    batches: BTreeMap<usize, Arc<Batch>>,
}

struct Opened {
    session: Arc<Session>,
    /// `cuFileDriverOpen` without its `cuFileDriverClose`.
    uses: usize,
}

fn library() -> MutexGuard<'static, Library> {
    static LIBRARY: LazyLock<Mutex<Library>> = LazyLock::new(Mutex::default);
    lock(&LIBRARY)
}

impl Library {
    /// Opens the driver unless it is open.
    fn open(&mut self, config: &'static Config) -> Answer<&mut Opened> {
        if self.opened.is_none() {
            let level = self.level.unwrap_or(self.staged.statistics_level());
            let session = Session::open(config, self.staged.clone(), level)?;
            // They are for one opening.
            self.staged = Parameters::default();
            self.opened = Some(Opened { session: Arc::new(session), uses: 0 });
        }
        self.opened.as_mut().ok_or(Code::INTERNAL_ERROR.into())
    }

    /// Parameters as they are now.
    fn parameters(&self) -> &Parameters {
        self.opened.as_ref().map_or(&self.staged, |opened| &opened.session.parameters)
    }

    /// Parameters for the next opening.
    fn staged(&mut self) -> Answer<&mut Parameters> {
        if self.opened.is_some() {
            return Err(Code::DRIVER_ALREADY_OPEN.into());
        }
        Ok(&mut self.staged)
    }
}

/// The open driver.
fn session() -> Answer<Arc<Session>> {
    let library = library();
    let opened = library.opened.as_ref().ok_or(Code::DRIVER_NOT_INITIALIZED)?;
    Ok(Arc::clone(&opened.session))
}

/// The open driver; it is opened if it is not, as files and buffers are registered without `cuFileDriverOpen`.
fn session_or_open(config: &'static Config) -> Answer<Arc<Session>> {
    let mut library = library();
    let opened = library.open(config)?;
    opened.uses = opened.uses.max(1);
    Ok(Arc::clone(&opened.session))
}

/// A call that can be made to fail, by its name.
fn guarded<T>(name: &'static str, body: impl FnOnce(&'static Config) -> Answer<T>) -> Answer<T> {
    let guarded = || {
        let config = Config::get().ok_or(Code::INTERNAL_ERROR)?;
        match config.faults.called(name) {
            Some(Effect::Code(code)) => Err(code.into()),
            _ => body(config),
        }
    };
    catch_unwind(AssertUnwindSafe(guarded)).unwrap_or(Err(Code::INTERNAL_ERROR.into()))
}

/// A call that returns a `CUfileError_t`.
fn call(name: &'static str, body: impl FnOnce(&'static Config) -> Answer) -> Status {
    guarded(name, body).map_or_else(Failure::status, |()| Status { error: 0, cuda: 0 })
}

/// A call that is counted, on the open driver.
fn counted<T>(call: Call, session: &Session, body: impl FnOnce(&Session) -> Answer<T>) -> Answer<T> {
    let answer = body(session);
    lock(&session.counters).call(call, answer.is_ok());
    answer
}
