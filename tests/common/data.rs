//! Random numbers, and tensors over slices, for the tests of the operations.

use half::bf16;
use indexcache::tensor::{Device, Element, Tensor, dense_strides};

pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 11) as usize % n
    }
    /// About normal, variance 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..6).map(|_| (self.bits() >> 40) as f32 / (1u64 << 24) as f32).sum();
        (sum - 3.0) * 1.414
    }
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
    pub fn halves(&mut self, n: usize) -> Vec<bf16> {
        (0..n).map(|_| bf16::from_f32(self.normal())).collect()
    }
    pub fn shuffled(&mut self, n: usize) -> Vec<i32> {
        let mut v: Vec<i32> = (0..n as i32).collect();
        for i in (1..n).rev() {
            v.swap(i, self.below(i + 1));
        }
        v
    }
}

pub fn t<'a, T: Element>(name: &'static str, data: &'a [T], shape: &[usize]) -> Tensor<'a> {
    Tensor::from_slice(name, data, shape).unwrap()
}

pub fn m<'a, T: Element>(name: &'static str, data: &'a mut [T], shape: &[usize]) -> Tensor<'a> {
    Tensor::from_slice_mut(name, data, shape).unwrap()
}

/// A tensor with `pad` unused elements after each step of the first dimension.
pub fn padded<'a, T: Element>(
    name: &'static str,
    data: &'a [T],
    shape: &[usize],
    pad: usize,
) -> Tensor<'a> {
    let mut strides = dense_strides(shape);
    strides[0] += pad;
    assert!(shape[0] * strides[0] <= data.len());
    // SAFETY: within `data`, by the assert.
    unsafe {
        let ptr = data.as_ptr() as *mut u8;
        Tensor::from_raw_parts(name, ptr, Device::Cpu, T::DTYPE, shape, &strides[..shape.len()])
            .unwrap()
    }
}
