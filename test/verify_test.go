package test

import (
	"regexp"
	"testing"

	"gapless/store/storetest"
)

func TestVerify_saysThatALogCameWhole(t *testing.T) {
	t.Parallel()
	n := nodes(t, 1, storetest.Redis(t))[0]
	id := newID()
	n.append(t, id, `[{"content":"Tea "},{"content":"is "},{"content":"ready."},{"type":"end"}]`)
	for _, path := range []string{"", "/stream"} {
		code, out := program(t, nil, "verify", "-until-end", n.url("/v1/sessions/"+id+path))
		if code != 0 || !regexp.MustCompile(`^complete: 4 chunks, [123] cuts?, sha256 [0-9a-f]{64}\n$`).MatchString(out) {
			t.Errorf("%d: %s", code, out)
		}
	}
	if code, out := program(t, nil, "verify", n.url("/v1/sessions/"+newID())); code != 1 {
		t.Errorf("%d: %s", code, out)
	}
}
