package web_test

import (
	"bytes"
	"flag"
	"image"
	"image/color"
	"image/gif"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
)

var takePicture = flag.Bool("picture", false, "make pictures/heals.gif, as make picture does")

// movingPicture shows, at the top of the README, an answer that is cut and heals next to the naive viewer.
const movingPicture = "heals.gif"

// make picture takes it: the page's own show, in real time. Without it, this test checks only the file.
func TestPicture_showsAnAnswerThatIsCutAndHeals(t *testing.T) {
	t.Parallel()
	file := filepath.Join("pictures", movingPicture)
	if *takePicture {
		if err := os.WriteFile(file, filmTheShow(t), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil || len(text) >= 1_000_000 {
		t.Fatalf("it has %d bytes (%v): make picture", len(text), err)
	}
	film, err := gif.DecodeAll(bytes.NewReader(text))
	if err != nil || len(film.Image) < 10 || film.Config.Width < 600 {
		t.Fatalf("it has %d frames of %d × %d (%v)", len(film.Image), film.Config.Width, film.Config.Height, err)
	}
	length := 0 // in 1/100 s
	for _, delay := range film.Delay {
		length += delay
	}
	if length < 500 || length > 6000 {
		t.Errorf("it takes %d ms", 10*length)
	}
	readme, err := os.ReadFile(filepath.Join("..", "README.md"))
	at := strings.Index(string(readme), "web/pictures/"+movingPicture)
	if first := strings.Index(string(readme), "\n## "); err != nil || at < 0 || at > first {
		t.Errorf("the README does not show it at its top (%v)", err)
	}
}

// filmTheShow presses "Show me" on an empty page, and returns what can be seen then, until the result is there.
func filmTheShow(t *testing.T) []byte {
	t.Helper()
	w := world{browser: chromium(t), node: start(t)}
	p := look{1024, 600, "light", true}.open(t, w, w.node.url("/?session=picture"))
	p.until(`gapless.state === 'live' && document.querySelector('.offer .show').checkVisibility()`)
	p.press("#inspect") // room for both viewers
	p.until(`document.getElementById('inspector').hidden`)
	var files [][]byte // decoded later: that would take time from the film
	var times []time.Time
	take := func() {
		t.Helper()
		file, err := chromedp.Run(p.ctx, chromedp.CaptureScreenshot())
		if err != nil {
			t.Fatal(err)
		}
		files, times = append(files, file), append(times, time.Now())
	}
	take()
	p.press(".offer .show")
	for !eval[bool](p, `document.getElementById('shown').classList.contains('result')`) {
		take()
		if problem := p.text("problem"); problem != "" {
			t.Fatal(problem)
		}
		<-time.After(500 * time.Millisecond) // the pace of the film
	}
	p.press("#to-gap")
	take()
	var shots []image.Image
	for _, file := range files {
		shot, err := png.Decode(bytes.NewReader(file))
		if err != nil {
			t.Fatal(err)
		}
		shots = append(shots, shot)
	}
	return encode(t, shots, times)
}

// encode makes a GIF that repeats. Each frame is only the part of a shot that differs from the one before.
func encode(t *testing.T, shots []image.Image, times []time.Time) []byte {
	t.Helper()
	// The page has few colours, and shades of them at the edges of letters.
	count := map[color.RGBA]int{}
	bounds := shots[0].Bounds()
	for _, shot := range shots {
		for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
			for x := bounds.Min.X; x < bounds.Max.X; x++ {
				count[rgba(shot.At(x, y))]++
			}
		}
	}
	var colours []color.RGBA
	for c := range count {
		colours = append(colours, c)
	}
	slices.SortFunc(colours, func(a, b color.RGBA) int { return count[b] - count[a] })
	palette := color.Palette{}
	for _, c := range colours[:min(len(colours), 31)] {
		palette = append(palette, c)
	}
	same := uint8(len(palette)) // stands for what the frame before has there
	nearest := map[color.RGBA]uint8{}
	index := func(c color.Color) uint8 {
		it := rgba(c)
		i, ok := nearest[it]
		if !ok {
			i = uint8(palette.Index(it))
			nearest[it] = i
		}
		return i
	}

	frames := append(slices.Clone(palette), color.Transparent)
	film := &gif.GIF{Config: image.Config{ColorModel: frames, Width: bounds.Dx(), Height: bounds.Dy()}}
	var before *image.Paletted
	for i, shot := range shots {
		now := image.NewPaletted(bounds, palette)
		changed := image.Rectangle{}
		for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
			for x := bounds.Min.X; x < bounds.Max.X; x++ {
				now.SetColorIndex(x, y, index(shot.At(x, y)))
				if before == nil || now.ColorIndexAt(x, y) != before.ColorIndexAt(x, y) {
					changed = changed.Union(image.Rect(x, y, x+1, y+1))
				}
			}
		}
		delay := 600 // the result stays for a while
		if i+1 < len(shots) {
			delay = int(times[i+1].Sub(times[i]).Milliseconds() / 10)
		}
		if i == 0 {
			delay = max(delay, 150)
		}
		if changed.Empty() { // nothing has changed: the frame before stays longer
			film.Delay[len(film.Delay)-1] += delay
			continue
		}
		frame := image.NewPaletted(changed, frames)
		for y := changed.Min.Y; y < changed.Max.Y; y++ {
			for x := changed.Min.X; x < changed.Max.X; x++ {
				i := now.ColorIndexAt(x, y)
				if before != nil && i == before.ColorIndexAt(x, y) {
					i = same
				}
				frame.SetColorIndex(x, y, i)
			}
		}
		film.Image, film.Delay, film.Disposal = append(film.Image, frame), append(film.Delay, delay), append(film.Disposal, gif.DisposalNone)
		before = now
	}
	var text bytes.Buffer
	if err := gif.EncodeAll(&text, film); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d frames, %d colours, %d bytes", len(film.Image), len(palette), text.Len())
	return text.Bytes()
}

func rgba(c color.Color) color.RGBA {
	r, g, b, _ := c.RGBA()
	return color.RGBA{uint8(r >> 8), uint8(g >> 8), uint8(b >> 8), 255}
}
