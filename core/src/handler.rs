//! What a user's function must look like to serve requests.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;

use bytes::Bytes;

use crate::context::Context;
use crate::envelope::Headers;
use crate::fault::Fault;
use crate::name::ContentType;

/// The answer of a raw handler: a body, and what it is.
#[derive(Clone, Debug, Default)]
pub struct Response {
    /// The body.
    pub body: Bytes,
    /// What the body is.
    pub content_type: Option<ContentType>,
    /// User headers.
    pub headers: Headers,
}

impl<T: Into<Bytes>> From<T> for Response {
    fn from(body: T) -> Self {
        Self {
            body: body.into(),
            content_type: None,
            headers: Headers::new(),
        }
    }
}

/// An async function from a typed input to `Result<output, Fault>`, with or without a [`Context`]. JSON bodies.
///
/// Implemented for `Fn(In) -> impl Future` and `Fn(In, Context) -> impl Future`. Clones of the server's tasks share it.
#[cfg(feature = "json")]
pub trait Handler<Args>: Send + Sync + 'static {
    /// What it is told besides: a [`Context`], or nothing.
    type About: About;

    /// Decodes the body and runs the function. The future may outlive the handler.
    fn handle(
        &self,
        body: Bytes,
        about: Self::About,
    ) -> impl Future<Output = Result<Response, Failure>> + Send + 'static;
}

/// An async function from bytes to `Result<impl Into<Response>, Fault>`, with or without a [`Context`].
///
/// Implemented for `Fn(Bytes) -> impl Future` and `Fn(Bytes, Context) -> impl Future`.
pub trait RawHandler<Args>: Send + Sync + 'static {
    /// What it is told besides: a [`Context`], or nothing.
    type About: About;

    /// Runs the function. The future may outlive the handler.
    fn handle(
        &self,
        body: Bytes,
        about: Self::About,
    ) -> impl Future<Output = Result<Response, Failure>> + Send + 'static;
}

/// What a handler is told of its request besides the input: a [`Context`], or nothing, of which none is made then.
///
/// It is the bound of [`RawHandler::About`] and of that of a typed handler, for who names it. Only these two are of use.
pub trait About: Send + 'static {
    /// Takes what it wants.
    fn from_context(context: impl FnOnce() -> Context) -> Self;
}

impl About for Context {
    fn from_context(context: impl FnOnce() -> Self) -> Self {
        context()
    }
}

impl About for () {
    fn from_context(_: impl FnOnce() -> Context) -> Self {}
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// The body is not of the handler's type; the handler was not started.
    Undecodable(String),
    /// The handler's own fault.
    Fault(Fault),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

#[cfg(feature = "json")]
impl<F, In, Out, Running> Handler<(In,)> for F
where
    F: Fn(In) -> Running + Send + Sync + 'static,
    In: serde::de::DeserializeOwned + Send,
    Out: serde::Serialize + Send,
    Running: Future<Output = Result<Out, Fault>> + Send + 'static,
{
    type About = ();

    fn handle(
        &self,
        body: Bytes,
        (): (),
    ) -> impl Future<Output = Result<Response, Failure>> + Send + 'static {
        let running = json_input(body).map(self);
        async move { json_response(&running?.await?) }
    }
}

#[cfg(feature = "json")]
impl<F, In, Out, Running> Handler<(In, Context)> for F
where
    F: Fn(In, Context) -> Running + Send + Sync + 'static,
    In: serde::de::DeserializeOwned + Send,
    Out: serde::Serialize + Send,
    Running: Future<Output = Result<Out, Fault>> + Send + 'static,
{
    type About = Context;

    fn handle(
        &self,
        body: Bytes,
        context: Context,
    ) -> impl Future<Output = Result<Response, Failure>> + Send + 'static {
        let running = json_input(body).map(|input| self(input, context));
        async move { json_response(&running?.await?) }
    }
}

impl<F, Out, Running> RawHandler<(Bytes,)> for F
where
    F: Fn(Bytes) -> Running + Send + Sync + 'static,
    Out: Into<Response>,
    Running: Future<Output = Result<Out, Fault>> + Send + 'static,
{
    type About = ();

    fn handle(
        &self,
        body: Bytes,
        (): (),
    ) -> impl Future<Output = Result<Response, Failure>> + Send + 'static {
        let running = self(body);
        async move { Ok(running.await?.into()) }
    }
}

impl<F, Out, Running> RawHandler<(Bytes, Context)> for F
where
    F: Fn(Bytes, Context) -> Running + Send + Sync + 'static,
    Out: Into<Response>,
    Running: Future<Output = Result<Out, Fault>> + Send + 'static,
{
    type About = Context;

    fn handle(
        &self,
        body: Bytes,
        context: Context,
    ) -> impl Future<Output = Result<Response, Failure>> + Send + 'static {
        let running = self(body, context);
        async move { Ok(running.await?.into()) }
    }
}

/// This share of the body is gone when the handler starts, so that a large one is not held for as long as that runs.
#[cfg(feature = "json")]
fn json_input<In: serde::de::DeserializeOwned>(body: Bytes) -> Result<In, Failure> {
    let input = crate::codec::decode(&body).map_err(|error| {
        Failure::Undecodable(format!("the body is not of the expected type: {error}"))
    });
    crate::codec::reuse(body);
    input
}

#[cfg(feature = "json")]
fn json_response(output: &impl serde::Serialize) -> Result<Response, Failure> {
    match crate::codec::encode(output) {
        Ok(body) => Ok(Response {
            body,
            content_type: Some(ContentType::JSON),
            headers: Headers::new(),
        }),
        Err(error) => Err(Failure::Fault(Fault::new(
            crate::fault::Code::Internal,
            error.message(),
        ))),
    }
}

/// A handler at work.
pub(crate) type Handling = Pin<Box<dyn Future<Output = Result<Response, Failure>> + Send>>;

/// A handler whose types are forgotten.
pub(crate) trait AnyHandler: Send + Sync {
    /// `context` is asked for one if the handler wants it. May panic, as the user's function may.
    fn handle(&self, body: Bytes, context: &mut dyn FnMut() -> Context) -> Handling;
}

#[cfg(feature = "json")]
pub(crate) struct Json<H, Args>(pub(crate) H, pub(crate) PhantomData<fn(Args)>);

#[cfg(feature = "json")]
impl<H: Handler<Args>, Args: 'static> AnyHandler for Json<H, Args> {
    fn handle(&self, body: Bytes, context: &mut dyn FnMut() -> Context) -> Handling {
        Box::pin(self.0.handle(body, H::About::from_context(context)))
    }
}

pub(crate) struct Raw<H, Args>(pub(crate) H, pub(crate) PhantomData<fn(Args)>);

impl<H: RawHandler<Args>, Args: 'static> AnyHandler for Raw<H, Args> {
    fn handle(&self, body: Bytes, context: &mut dyn FnMut() -> Context) -> Handling {
        Box::pin(self.0.handle(body, H::About::from_context(context)))
    }
}

#[cfg(all(test, feature = "json"))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures_util::FutureExt;

    use super::*;

    /// A body that says when it is gone.
    struct Body(Arc<AtomicBool>);

    impl AsRef<[u8]> for Body {
        fn as_ref(&self) -> &[u8] {
            b"7"
        }
    }

    impl Drop for Body {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_body_is_gone_when_a_typed_handler_starts() {
        let gone = Arc::<AtomicBool>::default();
        let body = Bytes::from_owner(Body(Arc::clone(&gone)));
        let handler = move |_: u32| {
            let gone = gone.load(Ordering::Relaxed);
            async move { Ok::<_, Fault>(gone) }
        };
        let handled = handler.handle(body, ()).now_or_never();
        assert_eq!(handled.unwrap().unwrap().body, "true");
    }
}
