package embedded

import (
	"errors"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	lua "github.com/yuin/gopher-lua"
)

// This file does what lua-cjson does in Redis's scripts: it does not check for UTF-8, and the last of equal names wins.

// quote returns a text as JSON.
func quote(text string) string {
	const hex = "0123456789abcdef"
	out := append(make([]byte, 0, len(text)+2), '"')
	for _, c := range []byte(text) {
		switch {
		case c == '"' || c == '\\' || c == '/':
			out = append(out, '\\', c)
		case c >= '\b' && c <= '\r' && c != '\v':
			out = append(out, '\\', "btn_fr"[c-'\b'])
		case c < ' ' || c == 0x7f:
			out = append(out, `\u00`...)
			out = append(out, hex[c>>4], hex[c&15])
		default:
			out = append(out, c)
		}
	}
	return string(append(out, '"'))
}

var errJSON = errors.New("not JSON")

// decoder decodes JSON into Lua values. JSON's null becomes the value null, which is neither nil nor false.
type decoder struct {
	l    *lua.LState
	text string
	at   int
}

const mostNested = 1000

var null = &lua.LUserData{}

func decode(l *lua.LState, text string) (lua.LValue, error) {
	d := decoder{l: l, text: text}
	v, err := d.value(0)
	if d.space(); err == nil && d.at < len(text) {
		err = errJSON
	}
	return v, err
}

func (d *decoder) space() {
	for d.at < len(d.text) && strings.IndexByte(" \t\r\n", d.text[d.at]) >= 0 {
		d.at++
	}
}

// take consumes a character if it comes next, and reports whether it did.
func (d *decoder) take(c byte) bool {
	d.space()
	if d.at < len(d.text) && d.text[d.at] == c {
		d.at++
		return true
	}
	return false
}

func (d *decoder) value(depth int) (lua.LValue, error) {
	if depth > mostNested {
		return nil, errJSON
	}
	switch {
	case d.take('{'):
		t := d.l.NewTable()
		for more := !d.take('}'); more; {
			if !d.take('"') {
				return nil, errJSON
			}
			name, err := d.string()
			if err != nil || !d.take(':') {
				return nil, errJSON
			}
			v, err := d.value(depth + 1)
			if err != nil {
				return nil, err
			}
			t.RawSetString(name, v)
			if more = d.take(','); !more && !d.take('}') {
				return nil, errJSON
			}
		}
		return t, nil
	case d.take('['):
		t := d.l.NewTable()
		for more := !d.take(']'); more; {
			v, err := d.value(depth + 1)
			if err != nil {
				return nil, err
			}
			t.Append(v)
			if more = d.take(','); !more && !d.take(']') {
				return nil, errJSON
			}
		}
		return t, nil
	case d.take('"'):
		text, err := d.string()
		return lua.LString(text), err
	}
	for word, v := range map[string]lua.LValue{"true": lua.LTrue, "false": lua.LFalse, "null": null} {
		if strings.HasPrefix(d.text[d.at:], word) {
			d.at += len(word)
			return v, nil
		}
	}
	from := d.at
	for d.at < len(d.text) && strings.IndexByte("+-0123456789.eE", d.text[d.at]) >= 0 {
		d.at++
	}
	n, err := strconv.ParseFloat(d.text[from:d.at], 64)
	if from == d.at || err != nil && !errors.Is(err, strconv.ErrRange) {
		return nil, errJSON
	}
	return lua.LNumber(n), nil
}

// string decodes the rest of a string, after its opening quote.
func (d *decoder) string() (string, error) {
	var out []byte
	for d.at < len(d.text) {
		c := d.text[d.at]
		d.at++
		switch {
		case c == '"':
			return string(out), nil
		case c < ' ':
			return "", errJSON
		case c != '\\':
			out = append(out, c)
			continue
		}
		if d.at == len(d.text) {
			break
		}
		c = d.text[d.at]
		d.at++
		if i := strings.IndexByte(`"\/bfnrt`, c); i >= 0 {
			out = append(out, "\"\\/\b\f\n\r\t"[i])
			continue
		}
		if c != 'u' {
			return "", errJSON
		}
		r, err := d.hex()
		if err != nil {
			return "", err
		}
		if utf16.IsSurrogate(r) {
			if !strings.HasPrefix(d.text[d.at:], `\u`) {
				return "", errJSON
			}
			d.at += 2
			low, err := d.hex()
			if err != nil {
				return "", err
			}
			if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
				return "", errJSON
			}
		}
		out = utf8.AppendRune(out, r)
	}
	return "", errJSON
}

func (d *decoder) hex() (rune, error) {
	if d.at+4 > len(d.text) {
		return 0, errJSON
	}
	n, err := strconv.ParseUint(d.text[d.at:d.at+4], 16, 16)
	d.at += 4
	if err != nil {
		return 0, errJSON
	}
	return rune(n), nil
}
