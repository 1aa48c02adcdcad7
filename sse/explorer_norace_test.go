//go:build !race

package sse

// scopeDepth is how deep the explorer plays every order of few moves: a minute of one core.
const scopeDepth = 7
