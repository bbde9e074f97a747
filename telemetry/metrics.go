package telemetry

import (
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
)

// A Family is a metric in Prometheus's terms: Kind is counter, gauge or
// histogram; a histogram's samples are those that end in _bucket, with a
// cumulative count below the label le, _sum and _count.
type Family struct {
	Name, Kind, Help string
	Samples          []Sample
}

// A Sample is one value; Labels are names and values in turn.
type Sample struct {
	Name   string
	Value  float64
	Labels []string
}

func (s Sample) attrs() []Attr {
	var as []Attr
	for i := 0; i+1 < len(s.Labels); i += 2 {
		as = append(as, String(s.Labels[i], s.Labels[i+1]))
	}
	return as
}

func encodeFamilies(at time.Time, families []Family) []*metricspb.Metric {
	now := uint64(at.UnixNano())
	var all []*metricspb.Metric
	for _, f := range families {
		if len(f.Samples) == 0 {
			continue
		}
		m := &metricspb.Metric{Name: f.Name, Description: f.Help}
		switch f.Kind {
		case "histogram":
			m.Data = &metricspb.Metric_Histogram{Histogram: &metricspb.Histogram{AggregationTemporality: metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE,
				DataPoints: histograms(now, f)}}
		case "counter":
			m.Data = &metricspb.Metric_Sum{Sum: &metricspb.Sum{AggregationTemporality: metricspb.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE, IsMonotonic: true,
				DataPoints: numbers(now, f)}}
		default:
			m.Data = &metricspb.Metric_Gauge{Gauge: &metricspb.Gauge{DataPoints: numbers(now, f)}}
		}
		all = append(all, m)
	}
	return all
}

func numbers(now uint64, f Family) []*metricspb.NumberDataPoint {
	var all []*metricspb.NumberDataPoint
	for _, s := range f.Samples {
		all = append(all, &metricspb.NumberDataPoint{TimeUnixNano: now, Attributes: attributes(s.attrs()), Value: &metricspb.NumberDataPoint_AsDouble{AsDouble: s.Value}})
	}
	return all
}

// histograms gathers the samples of each set of labels, which come in order.
func histograms(now uint64, f Family) []*metricspb.HistogramDataPoint {
	var all []*metricspb.HistogramDataPoint
	at := map[string]*metricspb.HistogramDataPoint{}
	below := map[string]uint64{}
	for _, s := range f.Samples {
		le := math.Inf(1)
		if i := slices.Index(s.Labels, "le"); i >= 0 && i%2 == 0 && i+1 < len(s.Labels) {
			le, _ = strconv.ParseFloat(s.Labels[i+1], 64) // we wrote it
			s.Labels = slices.Delete(slices.Clone(s.Labels), i, i+2)
		}
		key := strings.Join(s.Labels, "\x00")
		p := at[key]
		if p == nil {
			p = &metricspb.HistogramDataPoint{TimeUnixNano: now, Attributes: attributes(s.attrs())}
			at[key], all = p, append(all, p)
		}
		switch {
		case strings.HasSuffix(s.Name, "_bucket"):
			p.BucketCounts = append(p.BucketCounts, uint64(s.Value)-below[key])
			below[key] = uint64(s.Value)
			if !math.IsInf(le, 1) {
				p.ExplicitBounds = append(p.ExplicitBounds, le)
			}
		case strings.HasSuffix(s.Name, "_sum"):
			p.Sum = &s.Value
		case strings.HasSuffix(s.Name, "_count"):
			p.Count = uint64(s.Value)
		}
	}
	return all
}
