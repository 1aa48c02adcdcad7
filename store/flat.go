package store

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"unicode/utf8"
)

// flat checks an element in one pass. ok is true if the element is a JSON object on one line, in valid UTF-8, whose
// values are text, whole numbers, true, false and null, without a \u. Nearly all elements are. ends is what the element
// claims to end. If ok is false, nothing is known about the element.
func flat(e []byte) (ends Ending, ok bool) {
	if len(e) < len(`{"":0}`) || e[0] != '{' {
		return 0, false
	}
	var high uint64 // has bit 7 of some byte set if a byte was not ASCII
	for i := 1; i < len(e); i++ {
		from := i + 1
		if i = textEnd(e, i, &high); i < 0 || i+2 >= len(e) || e[i] != ':' {
			return 0, false
		}
		name := e[from : i-1]
		i++
		switch c := e[i]; {
		case c == '"':
			from := i + 1
			if i = textEnd(e, i, &high); i < 0 {
				return 0, false
			}
			if string(name) == "type" {
				ends |= endingOf(string(e[from : i-1]))
			}
		case c >= '1' && c <= '9':
			for i++; i < len(e) && e[i] >= '0' && e[i] <= '9'; i++ {
			}
		case c == '0':
			i++
		case bytes.HasPrefix(e[i:], []byte("true")):
			i += len("true")
			if string(name) == "is_complete" {
				ends |= EndsMessage
			}
		case bytes.HasPrefix(e[i:], []byte("false")):
			i += len("false")
		case bytes.HasPrefix(e[i:], []byte("null")):
			i += len("null")
		default:
			return 0, false
		}
		switch {
		case i == len(e)-1 && e[i] == '}':
			return ends, high&(ones<<7) == 0 || utf8.Valid(e)
		case i >= len(e) || e[i] != ',':
			return 0, false
		}
	}
	return 0, false
}

// ones has a 1 in each byte.
const ones = 0x0101010101010101

// textEnd returns where the quoted text that begins at i ends, or -1 if it is no text, or a text that flat does not
// handle. It reads eight bytes at once: https://graphics.stanford.edu/~seander/bithacks.html#HasLessInWord.
func textEnd(e []byte, i int, high *uint64) int {
	if e[i] != '"' {
		return -1
	}
	for i++; i+8 <= len(e); {
		w := binary.LittleEndian.Uint64(e[i:])
		*high |= w
		quote, slash := w^('"'*ones), w^('\\'*ones)
		stop := ((w - ' '*ones) &^ w) | ((quote - ones) &^ quote) | ((slash - ones) &^ slash)
		if stop &= ones << 7; stop == 0 {
			i += 8
			continue
		}
		i += bits.TrailingZeros64(stop) / 8
		switch {
		case e[i] == '"':
			return i + 1
		case e[i] != '\\' || i+1 >= len(e) || !simpleEscape(e[i+1]):
			return -1
		}
		i += 2
	}
	for ; i < len(e); i++ {
		*high |= uint64(e[i])
		switch c := e[i]; {
		case c == '"':
			return i + 1
		case c < ' ':
			return -1
		case c == '\\':
			if i++; i >= len(e) || !simpleEscape(e[i]) {
				return -1
			}
		}
	}
	return -1
}

func simpleEscape(c byte) bool {
	switch c {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return true
	}
	return false
}
