//! What the source of a cell refers to.

use std::any::Any;
use std::collections::HashMap;
use std::fmt::Debug;
use std::panic::Location;
use std::sync::Arc;

use tunebook::display::MimeBundle;

use crate::process;

/// Printed by a cell whose `?` returned early: evcxr then forgets the variables that the cell defined.
pub const USER_ERROR_OCCURRED: &str = "EVCXR_ERROR_OCCURRED";

/// Shows any value that has no `evcxr_display` of its own, by its `Debug`.
///
/// evcxr compiles a cell that ends in an expression with a call of `evcxr_display`, and when there is none a second time.
/// With this trait in scope there always is one; an inherent method is preferred to it.
pub trait Shown {
    /// Shows this value.
    fn evcxr_display(&self);
}

impl<T: Debug + ?Sized> Shown for T {
    fn evcxr_display(&self) {
        // `println!()` as the last line is no value.
        if std::any::type_name::<T>() != "()" {
            show_text(format!("{self:?}"));
        }
    }
}

fn show_text(text: String) {
    tunebook::display::show_bundle(&MimeBundle { html: String::new(), text });
}

/// Tells the kernel of an error that `?` returned from a cell.
///
/// The caller is the place of the `?`.
#[track_caller]
pub fn failed(type_name: &str, message: String) {
    process::report("error", type_name, &message, Location::caller());
}

/// The variables of a session, by name. Each cell takes those that it is compiled with, and puts them back.
pub struct VariableStore(HashMap<String, Box<dyn Any>>);

impl VariableStore {
    /// An empty store.
    #[allow(clippy::new_without_default)]
    pub fn new() -> VariableStore {
        VariableStore(HashMap::new())
    }

    /// Keeps a variable.
    pub fn put_variable<T: 'static>(&mut self, name: &str, value: T) {
        self.put(name, Box::new(value));
    }

    /// Whether the variable still has the type that the cell was compiled with. If not, it is lost, and evcxr is told.
    pub fn check_variable<T: 'static>(&mut self, name: &str) -> bool {
        let same = self.get(name).is_none_or(|v| v.is::<T>());
        if !same {
            lost(name);
        }
        same
    }

    /// Takes a variable out.
    ///
    /// # Panics
    /// Without a variable of that name and type: [`check_variable`](Self::check_variable) comes first.
    pub fn take_variable<T: 'static>(&mut self, name: &str) -> T {
        match self.take(name).downcast() {
            Ok(value) => *value,
            Err(_) => panic!("the variable `{name}` has another type"),
        }
    }

    /// A value that is made once in a session: the executor of asynchronous cells.
    ///
    /// # Panics
    /// If the name was used with another type.
    pub fn lazy_arc<T: 'static, F: FnOnce() -> T>(&mut self, name: &str, create: F) -> Arc<T> {
        let value = self.0.entry(name.to_owned()).or_insert_with(|| Box::new(Arc::new(create())));
        value.downcast_ref::<Arc<T>>().expect("one type for each name").clone()
    }

    // Not generic, so compiled here and not in each cell.

    fn put(&mut self, name: &str, value: Box<dyn Any>) {
        self.0.insert(name.to_owned(), value);
    }

    fn get(&self, name: &str) -> Option<&dyn Any> {
        self.0.get(name).map(|v| &**v)
    }

    fn take(&mut self, name: &str) -> Box<dyn Any> {
        self.0.remove(name).unwrap_or_else(|| panic!("the variable `{name}` has gone missing"))
    }
}

fn lost(name: &str) {
    eprintln!("The type of the variable {name} was redefined, so it is lost.");
    println!("EVCXR_VARIABLE_CHANGED_TYPE:{name}");
}

/// The store of a new session. It lives as long as the process.
pub fn create_variable_store() -> *mut VariableStore {
    Box::into_raw(Box::new(VariableStore::new()))
}
