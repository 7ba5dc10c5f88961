//! Numbers that stay on the device until somebody asks.

/// A result of work that may still run. Reading it waits for the device, so a training step reads once, at its end.
pub struct Deferred<T>(Kind<T>);

enum Kind<T> {
    Here(T),
    There(Box<dyn FnOnce() -> T>),
}

impl<T> Deferred<T> {
    /// What is known already.
    pub fn here(value: T) -> Deferred<T> {
        Deferred(Kind::Here(value))
    }

    /// What `read` fetches when it is asked.
    pub fn there(read: impl FnOnce() -> T + 'static) -> Deferred<T> {
        Deferred(Kind::There(Box::new(read)))
    }

    /// The value.
    pub fn get(self) -> T {
        match self.0 {
            Kind::Here(value) => value,
            Kind::There(read) => read(),
        }
    }
}
