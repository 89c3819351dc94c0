//! Memory that the kernel reads and writes while we hold it: batch buffer, request buffers, bitmap.
//!
//! A [`Memory`] is one mapping; a [`Buffer`] is a range of it that keeps the mapping alive, so that I/O in flight never outlives
//! what it points at. One thread owns a mapping (`Rc`), as one thread owns a volume.
//! A mapping of a tmpfs file outlives the process: that is what "surviving" means in this project.

// UNSAFETY: maps memory and hands raw ranges of it to the kernel; every access is bounds-checked here.
#![expect(unsafe_code)]

use std::cell::Cell;
use std::fs::File;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::rc::Rc;

use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous, munmap};

/// One mapping.
pub struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    owned: bool,
    locked: Cell<bool>,
    // One thread only: the kernel is the only other party that touches it.
    not_sync: PhantomData<Rc<()>>,
}

impl Memory {
    /// Fresh zeroed memory of this process.
    pub fn anonymous(bytes: usize) -> std::io::Result<Rc<Memory>> {
        let length = NonZeroUsize::new(bytes).ok_or(std::io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh private mapping at an address of the kernel's choice aliases nothing.
        let start = unsafe {
            mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE,
            )?
        };
        Ok(Rc::new(Memory {
            start: start.cast(),
            bytes,
            owned: true,
            locked: Cell::new(false),
            not_sync: PhantomData,
        }))
    }

    /// The first `bytes` of a file, shared: what is stored here outlives the process. The file must already have its blocks
    /// (`fallocate`), or a full file system would arrive as SIGBUS.
    pub fn of_file(file: &File, bytes: usize) -> std::io::Result<Rc<Memory>> {
        let length = NonZeroUsize::new(bytes).ok_or(std::io::ErrorKind::InvalidInput)?;
        // SAFETY: a shared mapping at an address of the kernel's choice; the file is ours alone (mode 0600, exclusive lock).
        let start = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE,
                file,
                0,
            )?
        };
        Ok(Rc::new(Memory {
            start: start.cast(),
            bytes,
            owned: true,
            locked: Cell::new(false),
            not_sync: PhantomData,
        }))
    }

    /// Memory that somebody else owns (a front end's request buffers).
    ///
    /// # Safety
    /// `start..start + bytes` must stay valid and be touched by nobody else but the kernel for as long as the result lives.
    pub unsafe fn borrowed(start: NonNull<u8>, bytes: usize) -> Rc<Memory> {
        Rc::new(Memory {
            start,
            bytes,
            owned: false,
            locked: Cell::new(false),
            not_sync: PhantomData,
        })
    }

    /// Locks the mapping into RAM, so that memory reclaim never waits for our own device. Refusal is a degradation, not a failure.
    pub fn lock(&self) -> std::io::Result<()> {
        // SAFETY: the range is our live mapping.
        unsafe { mlock(self.start.cast(), self.bytes)? };
        self.locked.set(true);
        Ok(())
    }

    /// Whether [`Memory::lock`] has succeeded.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.locked.get()
    }

    /// Size of the mapping.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.bytes),
            "range outside the mapping"
        );
        // SAFETY: the range lies inside the mapping by the assertion.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// Copies `source` to `offset`.
    pub fn copy_in(&self, offset: usize, source: &[u8]) {
        let target = self.at(offset, source.len());
        // SAFETY: `at` checked the target; a Rust slice cannot overlap it, because slices of it exist only inside the closures below.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target, source.len()) }
    }

    /// Runs `reader` on a range. No I/O may be writing into the range meanwhile.
    pub fn read_with<R>(&self, offset: usize, length: usize, reader: impl FnOnce(&[u8]) -> R) -> R {
        // SAFETY: `at` checked the range; this thread is the only one, and callers hold no mutable slice (write_with's ends with its closure).
        reader(unsafe { std::slice::from_raw_parts(self.at(offset, length), length) })
    }

    /// Runs `writer` on a range. No I/O may be using the range meanwhile, and the closure must not touch this mapping otherwise.
    pub fn write_with<R>(
        &self,
        offset: usize,
        length: usize,
        writer: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        // SAFETY: as above; the closure contract forbids aliasing.
        writer(unsafe { std::slice::from_raw_parts_mut(self.at(offset, length), length) })
    }

    /// Reads a u64 (native endianness: this memory never leaves the machine) before everything after it in program order.
    #[must_use]
    pub fn load(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: in range and aligned (mappings are page-aligned). Volatile: another mapping of the file may have written it.
        let value = unsafe { self.at(offset, 8).cast::<u64>().read_volatile() };
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        value
    }

    /// Writes a u64 after everything before it in program order: a process that is killed between two stores leaves the first.
    pub fn store(&self, offset: usize, value: u64) {
        assert!(offset.is_multiple_of(8));
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        // SAFETY: in range and aligned.
        unsafe { self.at(offset, 8).cast::<u64>().write_volatile(value) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: our own mapping, and every Buffer into it holds an Rc, so none is left.
            let _ = unsafe { munmap(self.start.cast(), self.bytes) };
        }
    }
}

/// A range of a mapping, for I/O.
#[derive(Clone)]
pub struct Buffer {
    memory: Rc<Memory>,
    offset: usize,
    bytes: usize,
}

impl Buffer {
    /// The range `[offset, offset + bytes)` of `memory`.
    #[must_use]
    pub fn new(memory: &Rc<Memory>, offset: usize, bytes: usize) -> Buffer {
        let _ = memory.at(offset, bytes);
        Buffer {
            memory: Rc::clone(memory),
            offset,
            bytes,
        }
    }

    /// A fresh buffer of its own.
    pub fn anonymous(bytes: usize) -> std::io::Result<Buffer> {
        Ok(Buffer::new(&Memory::anonymous(bytes)?, 0, bytes))
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// A part of this buffer.
    #[must_use]
    pub fn slice(&self, offset: usize, bytes: usize) -> Buffer {
        assert!(
            offset
                .checked_add(bytes)
                .is_some_and(|end| end <= self.bytes),
            "range outside the buffer"
        );
        Buffer {
            memory: Rc::clone(&self.memory),
            offset: self.offset + offset,
            bytes,
        }
    }

    /// Runs `reader` on the bytes (see [`Memory::read_with`]).
    pub fn read_with<R>(&self, reader: impl FnOnce(&[u8]) -> R) -> R {
        self.memory.read_with(self.offset, self.bytes, reader)
    }

    /// Runs `writer` on the bytes (see [`Memory::write_with`]).
    pub fn write_with<R>(&self, writer: impl FnOnce(&mut [u8]) -> R) -> R {
        self.memory.write_with(self.offset, self.bytes, writer)
    }

    /// The address for the kernel.
    #[must_use]
    pub fn pointer(&self) -> *mut u8 {
        self.memory.at(self.offset, self.bytes)
    }
}
